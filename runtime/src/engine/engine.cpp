// Orchestration: which rows are computed, and the order of layers. The layer itself is in layer.cpp.
#include "irq/engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "irq/cpu.h"
#include "irq/error.h"
#include "vector_ops.h"
#include "workspace.h"

namespace irq {
namespace {

constexpr std::size_t max_batch = 256;          // rows computed at once,
constexpr std::size_t max_values = 1 << 24;     // but no wider than this together: fewer beyond a width of 65536
constexpr std::int64_t default_context = 4096;  // at most

// An environment that asks for instructions this machine lacks: whoever set it would take other numbers for theirs.
void check_isa() {
    if (!isa_request_refused()) return;
    const char *got = std::getenv("IRQ_ISA");
    throw Error(Fault::usage, "no such instruction set here", "IRQ_ISA",
                std::string("one of this machine's, the best of which is ") + isa_name(active_isa()),
                got == nullptr ? "" : got);
}

EngineOptions checked(EngineOptions options) {
    check_isa();
    if (options.threads < 1 || options.threads > 256) {
        throw Error(Fault::usage, "threads out of range", "", "1 to 256", show(options.threads));
    }
    return options;
}

// Positions of a sequence. Beyond those the model was trained on, it says nothing of worth.
std::size_t context_of(const ModelConfig &config, std::size_t wanted) {
    const std::int64_t most = config.max_position_embeddings;
    if (wanted == 0) return static_cast<std::size_t>(std::min(default_context, most));
    if (wanted > static_cast<std::size_t>(most)) {
        throw Error(Fault::usage, "the model has no such context", "", "1 to " + show(most) + " positions", show(wanted));
    }
    return wanted;
}

std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

}  // namespace

Engine::Workspace::Workspace(const Model &model, const EngineOptions &options) {
    const ModelConfig &c = model.config();
    const auto u = [](std::int64_t value) { return static_cast<std::size_t>(value); };
    hidden = u(c.hidden_size);
    inner = u(c.intermediate_size);
    head_dim = u(c.head_dim);
    heads = u(c.num_attention_heads);
    kv_heads = u(c.num_key_value_heads);
    const std::size_t rank = model.max_rank();
    const std::size_t widest = std::max({hidden, inner, heads * head_dim, rank});
    batch = std::min({max_batch, options.context, std::max(max_values / widest, std::size_t{1})});
    rows.resize(batch);
    x.resize(batch * hidden);
    normed.resize(batch * hidden);
    q.resize(batch * heads * head_dim);
    k.resize(batch * kv_heads * head_dim);
    v.resize(batch * kv_heads * head_dim);
    attended.resize(batch * heads * head_dim);
    gate.resize(batch * inner);
    up.resize(batch * inner);
    cosines.resize(batch * head_dim / 2);
    sines.resize(batch * head_dim / 2);
    scores.resize(options.threads * most_queries * padded(options.context));
    hidden_input = Activations(batch, hidden, options.mode);
    head_input = Activations(batch, heads * head_dim, options.mode);
    inner_input = Activations(batch, inner, options.mode);
    if (rank == 0) return;
    for (Branch &branch : branches) {  // adapters are float carriers: exact in both modes
        branch.down.resize(batch * rank);
        branch.input = Activations(batch, rank, Mode::exact);
    }
}

Engine::Engine(const std::string &path, const EngineOptions &options)
    : id_(next_id()),
      options_(checked(options)),
      model_(path, options.adapter, options.adapter_scale, options.mode),
      pool_(options.threads) {
    options_.context = context_of(model_.config(), options_.context);
    workspace_ = std::make_unique<Workspace>(model_, options_);
}

Engine::~Engine() = default;

std::unique_ptr<Sequence> Engine::new_sequence() const {
    return std::make_unique<Sequence>(id_, model_.config(), options_.context, options_.half_cache);
}

void Engine::eval(const Row *rows, std::size_t count, float *logits) {
    model_.check_unchanged();
    const std::int64_t vocabulary = model_.config().vocab_size;
    for (std::size_t i = 0; i < count; ++i) {  // another engine's may have other sizes
        if (rows[i].sequence == nullptr || rows[i].sequence->owner_ != id_) {
            throw Error(Fault::usage, "the sequence is not of this engine", "", "", "",
                        "Take sequences from the engine that computes");
        }
        rows[i].sequence->added_ = 0;
    }
    for (std::size_t i = 0; i < count; ++i) {
        Sequence &sequence = *rows[i].sequence;
        if (rows[i].token < 0 || rows[i].token >= vocabulary) {
            throw Error(Fault::usage, "token outside the vocabulary", "", "0 to " + show(vocabulary - 1),
                        show(rows[i].token));
        }
        if (++sequence.added_ > sequence.capacity_ - sequence.length_) {
            const bool is_all = sequence.capacity_ == static_cast<std::size_t>(model_.config().max_position_embeddings);
            throw Error(Fault::usage, "the sequence is full", "", "at most " + show(sequence.capacity_) + " tokens", "",
                        is_all ? "The model has no more positions" : "Open the engine with a larger context");
        }
    }
    for (std::size_t begin = 0; begin < count; begin += workspace_->batch) {
        const std::size_t size = std::min(workspace_->batch, count - begin);
        logits += eval_batch(rows + begin, size, logits) * static_cast<std::size_t>(vocabulary);
    }
}

// Returns how many rows of logits were written.
std::size_t Engine::eval_batch(const Row *rows, std::size_t count, float *logits) {
    Workspace &w = *workspace_;
    w.count = count;
    for (std::size_t i = 0; i < count; ++i) {
        w.rows[i] = {rows[i].sequence, rows[i].sequence->length_++, rows[i].token, rows[i].wants_logits};
    }
    embed();
    for (std::size_t layer = 0; layer < model_.layers().size(); ++layer) {
        attend(model_.layers()[layer], layer);
        feed_forward(model_.layers()[layer]);
    }
    return logits_of_batch(logits);
}

std::size_t Engine::logits_of_batch(float *logits) {
    Workspace &w = *workspace_;
    std::size_t wanted = 0;
    for (std::size_t i = 0; i < w.count; ++i) {
        if (!w.rows[i].wants_logits) continue;
        if (wanted != i) std::copy_n(&w.x[i * w.hidden], w.hidden, &w.x[wanted * w.hidden]);
        ++wanted;
    }
    if (wanted == 0) return 0;
    w.count = wanted;
    normalize(model_.output_norm());
    const Projection head{&model_.head(), logits, model_.head().weight.rows, Store::set, nullptr};
    multiply(w.hidden_input, &head, 1);
    return wanted;
}

}  // namespace irq
