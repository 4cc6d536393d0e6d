// irq.h over Engine: exceptions become codes here and nowhere else.
#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "irq/engine.h"
#include "irq/error.h"
#include "irq/irq.h"

struct irq_engine {
    irq::Engine engine;
    std::vector<irq::Row> rows;  // scratch, grows to the longest call
};

struct irq_sequence {
    std::unique_ptr<irq::Sequence> sequence;
};

namespace {

thread_local std::string last_error = "no error";

// So short a text needs no memory beyond the string itself.
void remember(const char *text) noexcept {
    try {
        last_error = text;
    } catch (const std::bad_alloc &) {
        last_error = "out of memory";
    }
}

template <typename Body>
irq_status guarded(const Body &body) {
    try {
        body();
        return IRQ_OK;
    } catch (const irq::Error &error) {
        remember(error.what());
        switch (error.fault) {
            case irq::Fault::usage: return IRQ_USAGE;
            case irq::Fault::malformed: return IRQ_MALFORMED;
            case irq::Fault::unsupported: return IRQ_UNSUPPORTED;
            case irq::Fault::wrong_base: return IRQ_WRONG_BASE;
            default: return IRQ_INTERNAL;
        }
    } catch (const std::bad_alloc &) {
        remember("out of memory");
    } catch (const std::exception &error) {
        remember(error.what());
    } catch (...) {
        remember("unknown exception");
    }
    return IRQ_INTERNAL;
}

void require(bool condition, const char *message) {
    if (!condition) throw irq::Error(irq::Fault::usage, message);
}

irq_status eval(irq_engine *engine, irq_sequence *const *sequences, bool is_one_sequence, const int32_t *tokens,
                size_t count, float *logits, bool wants_all) {
    return guarded([&] {
        require(engine != nullptr && sequences != nullptr && tokens != nullptr, "a pointer is null");
        require(count > 0, "no tokens");
        require(logits != nullptr || !wants_all, "no place for the logits");
        engine->rows.resize(count);
        for (size_t i = 0; i < count; ++i) {
            irq_sequence *sequence = sequences[is_one_sequence ? 0 : i];
            require(sequence != nullptr, "a sequence is null");
            const bool wants = logits != nullptr && (wants_all || i + 1 == count);
            engine->rows[i] = {sequence->sequence.get(), tokens[i], wants};
        }
        engine->engine.eval(engine->rows.data(), count, logits);
    });
}

}  // namespace

irq_options irq_default_options(void) { return {nullptr, 1.0, 2, IRQ_EXACT, 0, 0}; }

irq_status irq_open(const char *path, const irq_options *options, irq_engine **engine) {
    return guarded([&] {
        require(path != nullptr && engine != nullptr, "a pointer is null");
        const irq_options given = options == nullptr ? irq_default_options() : *options;
        irq::EngineOptions wanted;
        if (given.adapter != nullptr) wanted.adapter = given.adapter;
        wanted.adapter_scale = given.adapter_scale;
        wanted.threads = given.threads;
        wanted.mode = given.mode == IRQ_FAST ? irq::Mode::fast : irq::Mode::exact;
        wanted.context = given.context;
        wanted.half_cache = given.half_cache != 0;
        *engine = new irq_engine{irq::Engine(path, wanted), {}};
    });
}

void irq_close(irq_engine *engine) { delete engine; }

irq_info irq_model_info(const irq_engine *engine) {
    const irq::Model &model = engine->engine.model();
    const irq::ModelConfig &c = model.config();
    const auto u = [](int64_t value) { return static_cast<uint32_t>(value); };
    const size_t context = engine->engine.options().context;
    return {u(c.num_hidden_layers),
            u(c.hidden_size),
            u(c.num_attention_heads),
            u(c.num_key_value_heads),
            u(c.head_dim),
            u(c.vocab_size),
            context,
            model.file_bytes(),
            model.bytes_per_token(),
            engine->engine.sequence_bytes()};
}

irq_status irq_sequence_new(irq_engine *engine, irq_sequence **sequence) {
    return guarded([&] {
        require(engine != nullptr && sequence != nullptr, "a pointer is null");
        *sequence = new irq_sequence{engine->engine.new_sequence()};
    });
}

void irq_sequence_free(irq_sequence *sequence) { delete sequence; }

size_t irq_sequence_length(const irq_sequence *sequence) { return sequence->sequence->length(); }

void irq_sequence_truncate(irq_sequence *sequence, size_t length) { sequence->sequence->truncate(length); }

irq_status irq_eval(irq_engine *engine, irq_sequence *sequence, const int32_t *tokens, size_t count, float *logits) {
    return eval(engine, &sequence, true, tokens, count, logits, false);
}

irq_status irq_eval_all(irq_engine *engine, irq_sequence *sequence, const int32_t *tokens, size_t count,
                        float *logits) {
    return eval(engine, &sequence, true, tokens, count, logits, true);
}

irq_status irq_eval_each(irq_engine *engine, irq_sequence *const *sequences, const int32_t *tokens, size_t count,
                         float *logits) {
    return eval(engine, sequences, false, tokens, count, logits, true);
}

int32_t irq_argmax(const float *logits, size_t count) {
    return static_cast<int32_t>(std::max_element(logits, logits + count) - logits);
}

const char *irq_last_error(void) { return last_error.c_str(); }
