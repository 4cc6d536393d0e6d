// The engine without Python, for sanitizers: test_engine CORPUS [MODEL [ADAPTER]].
//   CORPUS   formats/vectors/malformed/gguf: every file that stands alone is refused
//   MODEL    a small model: evaluated in several ways, then damaged a thousand times and opened again
//   ADAPTER  MODEL and this are a stock pair: refused apart, and when one is of another base
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "irq/engine.h"
#include "irq/error.h"
#include "irq/irq.h"

namespace {

void require(bool condition, const std::string &what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}

void test_threads() {
    irq::ThreadPool pool(4);
    std::vector<int> counts(64);
    for (std::size_t round = 0; round < 20000; ++round) {
        const std::size_t size = round % counts.size() + 1;
        pool.for_each(size, [&](std::size_t item, unsigned) { ++counts[item]; });
    }
    int total = 0;
    for (const int count : counts) total += count;
    require(counts[0] == 20000 && total > 20000, "every item is handed out once");
}

void test_corpus(const std::filesystem::path &corpus) {
    int refused = 0;
    for (const auto &entry : std::filesystem::directory_iterator(corpus)) {
        if (entry.path().extension() != ".gguf") continue;
        try {
            const irq::GgufFile gguf(entry.path().string());
            irq::read_model(gguf);
            require(false, entry.path().string() + " was accepted");
        } catch (const irq::Error &) {
            ++refused;
        }
    }
    require(refused > 100, "the corpus is there");
}

void test_c_interface(const std::string &model) {
    irq_engine *engine = nullptr;
    require(irq_open("/nonexistent", nullptr, &engine) == IRQ_USAGE && engine == nullptr, "no such file");
    require(std::string(irq_last_error()).find("/nonexistent") != std::string::npos, "the message names it");
    require(irq_open(nullptr, nullptr, &engine) == IRQ_USAGE, "null path");
    if (model.empty()) return;
    irq_options options = irq_default_options();
    options.context = 129;
    require(irq_open(model.c_str(), &options, &engine) == IRQ_USAGE && engine == nullptr, "more than the model's 128");
    options.context = SIZE_MAX;
    require(irq_open(model.c_str(), &options, &engine) == IRQ_USAGE && engine == nullptr, "more than there is");
    options.threads = 3;
    options.context = 40;
    require(irq_open(model.c_str(), &options, &engine) == IRQ_OK, irq_last_error());
    irq_sequence *sequences[2] = {nullptr, nullptr};
    for (irq_sequence *&sequence : sequences) require(irq_sequence_new(engine, &sequence) == IRQ_OK, "sequence");
    const std::size_t vocabulary = irq_model_info(engine).vocabulary;
    std::vector<float> all(8 * vocabulary), one(2 * vocabulary);
    const std::int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    require(irq_eval_all(engine, sequences[0], tokens, 8, all.data()) == IRQ_OK, "a prompt");
    for (std::size_t i = 0; i < 8; ++i) {
        require(irq_eval(engine, sequences[1], tokens + i, 1, one.data()) == IRQ_OK, "a token");
    }
    for (std::size_t i = 0; i < vocabulary; ++i) {
        require(std::abs(one[i] - all[7 * vocabulary + i]) < 1e-3F, "a prompt at once or by tokens");
    }
    require(irq_eval_each(engine, sequences, tokens, 2, one.data()) == IRQ_OK, "two sequences");
    irq_sequence_truncate(sequences[0], 2);
    require(irq_sequence_length(sequences[0]) == 2 && irq_sequence_length(sequences[1]) == 9, "lengths");
    require(irq_eval(engine, sequences[1], tokens, 8, nullptr) == IRQ_OK, "no logits wanted");
    std::vector<std::int32_t> many(64, 1);
    require(irq_eval(engine, sequences[1], many.data(), many.size(), nullptr) == IRQ_USAGE, "a full sequence");
    require(irq_sequence_length(sequences[1]) == 17, "is left as it was");
    for (irq_sequence *sequence : sequences) irq_sequence_free(sequence);
    irq_close(engine);
}

// The halves of a pair, by the C interface.
void test_pair(const std::string &base, const std::string &adapter) {
    irq_engine *engine = nullptr;
    require(irq_open(base.c_str(), nullptr, &engine) == IRQ_USAGE && engine == nullptr, "a base alone");
    require(std::string(irq_last_error()).find("one half of a pair") != std::string::npos, "the message says so");
    irq_options options = irq_default_options();
    options.adapter = adapter.c_str();
    require(irq_open(base.c_str(), &options, &engine) == IRQ_OK, irq_last_error());
    irq_close(engine);
    engine = nullptr;

    std::ifstream file(adapter, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(file)), {});
    const std::size_t hash = bytes.find("5e5e5e5e");
    require(hash != std::string::npos, "the adapter records a hash");
    bytes[hash] = '6';
    const std::string other = "adapter-of-another-base.gguf";
    std::ofstream(other, std::ios::binary) << bytes;
    options.adapter = other.c_str();
    require(irq_open(base.c_str(), &options, &engine) == IRQ_WRONG_BASE && engine == nullptr, "another base");
    std::filesystem::remove(other);
}

// A sequence is as long as its own engine says: another engine must not write to it.
void test_foreign_sequences(const std::string &model) {
    irq::EngineOptions options;
    options.context = 8;
    auto engine = std::make_unique<irq::Engine>(model, options);
    options.context = 128;
    irq::Engine other(model, options);
    std::vector<float> logits(static_cast<std::size_t>(other.model().config().vocab_size));
    const auto refuses = [&](irq::Sequence *sequence, const char *what) {
        const irq::Row row{sequence, 1, true};
        try {
            engine->eval(&row, 1, logits.data());
        } catch (const irq::Error &error) {
            require(error.fault == irq::Fault::usage && std::string(error.what()).find("of this engine") != std::string::npos,
                    what);
            return;
        }
        require(false, what);
    };
    const auto longer = other.new_sequence();
    for (int i = 0; i < 100; ++i) {
        const irq::Row row{longer.get(), 1, true};
        other.eval(&row, 1, logits.data());
    }
    refuses(longer.get(), "a sequence of another engine");
    refuses(nullptr, "no sequence");
    const auto orphan = engine->new_sequence();
    engine.reset();
    options.context = 8;
    engine = std::make_unique<irq::Engine>(model, options);  // likely at the same address
    refuses(orphan.get(), "a sequence of an engine that was closed");
    require(longer->length() == 100 && orphan->length() == 0, "and leaves them as they were");
}

// One to four random bytes, mostly of the header: an Error, or a model that computes something.
void test_damage(const std::string &model) {
    std::ifstream file(model, std::ios::binary);
    const std::vector<char> whole((std::istreambuf_iterator<char>(file)), {});
    const std::string path = model + ".damaged";
    std::mt19937 random(1);
    int opened = 0;
    for (int round = 0; round < 1000; ++round) {
        std::vector<char> bytes = whole;
        for (int i = 0; i < 1 + round % 4; ++i) {
            bytes[random() % (round % 8 == 0 ? bytes.size() : bytes.size() / 16)] = static_cast<char>(random());
        }
        std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        try {
            irq::EngineOptions options;
            options.mode = round % 2 == 0 ? irq::Mode::exact : irq::Mode::fast;
            options.half_cache = round % 3 == 0;
            options.context = 16;
            irq::Engine engine(path, options);
            const auto sequence = engine.new_sequence();
            std::vector<float> logits(static_cast<std::size_t>(engine.model().config().vocab_size));
            const irq::Row rows[3] = {{sequence.get(), 0, false}, {sequence.get(), 1, false}, {sequence.get(), 2, true}};
            engine.eval(rows, 3, logits.data());
            ++opened;
        } catch (const irq::Error &) {
        }
    }
    std::filesystem::remove(path);
    require(opened > 0, "some damage is to values only");
}

}  // namespace

int main(int argc, char **argv) {
    require(argc >= 2, "usage: test_engine CORPUS [MODEL [ADAPTER]]");
    if (argc > 3) {
        test_pair(argv[2], argv[3]);
        std::puts("ok");
        return 0;
    }
    const std::string model = argc > 2 ? argv[2] : "";
    test_threads();
    test_corpus(argv[1]);
    test_c_interface(model);
    if (!model.empty()) {
        test_foreign_sequences(model);
        test_damage(model);
    }
    std::puts("ok");
    return 0;
}
