// What the engine asks of the allocator: test_memory MODEL...
//   decoding   nothing, in every mode, on any number of threads
//   opening    if any request is refused, a thread's or a message's: an error that says something, and nothing lost
// Counts operator new everywhere, and the C functions where our own objects call them (linked with --wrap).
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "irq/engine.h"
#include "irq/irq.h"

namespace {

std::atomic<std::int64_t> requests{0};
std::atomic<std::int64_t> first_refused{-1}, last_refused{-1};  // numbers of requests

bool is_granted() {
    const std::int64_t number = requests.fetch_add(1);
    return number < first_refused.load() || number > last_refused.load();
}

void refuse(std::int64_t first, std::int64_t last) {
    requests.store(0);
    first_refused.store(first);
    last_refused.store(last);
}

void grant_all() { refuse(-1, -1); }

}  // namespace

extern "C" {
void *__real_malloc(std::size_t size);
void *__real_calloc(std::size_t count, std::size_t size);
void *__real_realloc(void *memory, std::size_t size);
void *__real_aligned_alloc(std::size_t alignment, std::size_t size);
int __real_posix_memalign(void **memory, std::size_t alignment, std::size_t size);

void *__wrap_malloc(std::size_t size) { return is_granted() ? __real_malloc(size) : nullptr; }
void *__wrap_calloc(std::size_t count, std::size_t size) { return is_granted() ? __real_calloc(count, size) : nullptr; }
void *__wrap_realloc(void *memory, std::size_t size) { return is_granted() ? __real_realloc(memory, size) : nullptr; }
void *__wrap_aligned_alloc(std::size_t alignment, std::size_t size) {
    return is_granted() ? __real_aligned_alloc(alignment, size) : nullptr;
}
int __wrap_posix_memalign(void **memory, std::size_t alignment, std::size_t size) {
    return is_granted() ? __real_posix_memalign(memory, alignment, size) : 12;  // ENOMEM
}
}

void *operator new(std::size_t size) {
    void *memory = is_granted() ? __real_malloc(size) : nullptr;
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
void *operator new(std::size_t size, std::align_val_t alignment) {
    const auto unit = static_cast<std::size_t>(alignment);
    void *memory = is_granted() ? __real_aligned_alloc(unit, (size + unit - 1) / unit * unit) : nullptr;
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void *memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

void require(bool condition, const std::string &what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}

// A prompt, tokens one by one, two sequences together, and a sequence begun again.
void test_decoding(const std::string &model, const irq::EngineOptions &options) {
    irq::Engine engine(model, options);
    const auto first = engine.new_sequence(), second = engine.new_sequence();
    std::vector<float> logits(12 * static_cast<std::size_t>(engine.model().config().vocab_size));
    std::vector<irq::Row> prompt;
    for (std::int32_t token = 1; token <= 12; ++token) prompt.push_back({first.get(), token, true});
    grant_all();
    engine.eval(prompt.data(), prompt.size(), logits.data());
    for (std::int32_t token = 0; token < 8; ++token) {
        const irq::Row row{first.get(), token, true};
        engine.eval(&row, 1, logits.data());
    }
    for (std::int32_t token = 0; token < 4; ++token) {
        const irq::Row rows[2] = {{first.get(), token, true}, {second.get(), token + 1, true}};
        engine.eval(rows, 2, logits.data());
    }
    first->truncate(0);
    engine.eval(prompt.data(), prompt.size(), logits.data());
    const std::int64_t count = requests.load();
    require(count == 0, model + ": evaluation asked for memory " + std::to_string(count) + " times");
}

void test_decoding_in_c(const std::string &model) {
    irq_engine *engine = nullptr;
    irq_sequence *sequence = nullptr;
    require(irq_open(model.c_str(), nullptr, &engine) == IRQ_OK && irq_sequence_new(engine, &sequence) == IRQ_OK, "open");
    std::vector<float> logits(irq_model_info(engine).vocabulary);
    std::int32_t token = 1;
    require(irq_eval(engine, sequence, &token, 1, logits.data()) == IRQ_OK, "the first call makes room for its rows");
    grant_all();
    for (int i = 0; i < 8; ++i) {
        require(irq_eval(engine, sequence, &token, 1, logits.data()) == IRQ_OK, "a token");
        token = irq_argmax(logits.data(), logits.size());
    }
    const std::int64_t count = requests.load();
    require(count == 0, "the C interface asked for memory " + std::to_string(count) + " times");
    irq_sequence_free(sequence);
    irq_close(engine);
}

// Opens a model and evaluates a token, with the n-th request refused, alone or with all that follow, for every n.
void test_no_memory(const std::string &model, bool is_alone) {
    irq_options options = irq_default_options();
    options.threads = 4;
    options.context = 16;
    for (std::int64_t n = 0;; ++n) {
        irq_engine *engine = nullptr;
        irq_sequence *sequence = nullptr;
        refuse(n, is_alone ? n : std::numeric_limits<std::int64_t>::max());
        irq_status status = irq_open(model.c_str(), &options, &engine);
        if (status == IRQ_OK) status = irq_sequence_new(engine, &sequence);
        const std::int32_t token = 1;
        if (status == IRQ_OK) status = irq_eval(engine, sequence, &token, 1, nullptr);
        const bool is_refused = requests.load() > n;
        grant_all();
        irq_sequence_free(sequence);
        irq_close(engine);
        require(*irq_last_error() != '\0', "a message");
        if (!is_refused) {
            require(status == IRQ_OK && n > 100, "with memory it works");
            return;
        }
        // keys and values, and mapping, say more than that memory is out; a number that cannot be shown is left out
        require(status == IRQ_INTERNAL || status == IRQ_USAGE || is_alone, "request " + std::to_string(n));
    }
}

// A file that does not exist, with the n-th request refused, for every n: the message, or that it has no memory.
void test_no_memory_for_a_message() {
    const std::string path = "/nonexistent/" + std::string(200, 'x');
    bool has_said_why = false, has_said_no_memory = false;
    for (std::int64_t n = 0; !has_said_why; ++n) {
        std::thread([&] {  // a new one has no room left from an earlier message
            irq_engine *engine = nullptr;
            refuse(n, n);
            const irq_status status = irq_open(path.c_str(), nullptr, &engine);
            const bool is_refused = requests.load() > n;
            grant_all();
            require(status == IRQ_USAGE || status == IRQ_INTERNAL, "an error");
            has_said_why = !is_refused && std::strstr(irq_last_error(), path.c_str()) != nullptr;
            has_said_no_memory |= std::strcmp(irq_last_error(), "out of memory") == 0;
            require(has_said_why == !is_refused && *irq_last_error() != '\0', irq_last_error());
        }).join();
    }
    require(has_said_no_memory, "that memory is out");
}

}  // namespace

int main(int argc, char **argv) {
    require(argc > 1, "usage: test_memory MODEL...");
    for (int i = 1; i < argc; ++i) {
        for (const irq::Mode mode : {irq::Mode::exact, irq::Mode::fast}) {
            for (const unsigned threads : {1U, 3U}) {
                test_decoding(argv[i], {"", 1, threads, mode, 64, threads == 3});
            }
        }
        test_decoding_in_c(argv[i]);
        test_no_memory(argv[i], true);
        test_no_memory(argv[i], false);
    }
    test_no_memory_for_a_message();
    std::puts("ok");
    return 0;
}
