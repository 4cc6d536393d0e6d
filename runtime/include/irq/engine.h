// Llama-family inference: a model, threads and scratch memory, and the sequences it reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "irq/kernels.h"
#include "irq/model.h"
#include "irq/threads.h"

namespace irq {

struct EngineOptions {
    std::string adapter;  // file; empty: what the model embeds
    double adapter_scale = 1;
    unsigned threads = 2;      // 1 to 256
    Mode mode = Mode::exact;
    std::size_t context = 0;   // positions a sequence may hold, the model's at most; 0: those, but 4096 at most
    bool half_cache = false;   // keys and values in fp16 instead of float32
};

// Keys and values of one text. Memory is taken from the system as positions fill.
class Sequence {
public:
    // owner: the engine that may append to it.
    Sequence(std::uint64_t owner, const ModelConfig &config, std::size_t capacity, bool is_half);

    std::size_t length() const { return length_; }
    std::size_t capacity() const { return capacity_; }
    void truncate(std::size_t length) { length_ = length < length_ ? length : length_; }

private:
    friend class Engine;
    struct Free {
        void operator()(void *memory) const;
    };

    std::uint64_t owner_;
    std::size_t layers_, heads_, capacity_, head_dim_;
    bool is_half_;
    std::size_t head_bytes_;  // of the keys, or of the values, of one head of one layer
    std::unique_ptr<std::uint8_t, Free> keys_, values_;
    std::size_t length_ = 0;
    std::size_t added_ = 0;  // by the evaluation in progress
};

// One position to compute.
struct Row {
    Sequence *sequence = nullptr;  // it is appended to
    std::int32_t token = 0;
    bool wants_logits = true;
};

// Not thread-safe: one evaluation at a time.
class Engine {
public:
    // Error: the files or the options are refused.
    Engine(const std::string &path, const EngineOptions &options);
    ~Engine();

    const Model &model() const { return model_; }
    const EngineOptions &options() const { return options_; }
    std::unique_ptr<Sequence> new_sequence() const;
    std::uint64_t sequence_bytes() const;  // of a full one

    // Appends every row to its sequence, in order, and writes the logits of the rows that want them,
    // (wanted, vocab_size). Rows of several sequences share the reading of the weights. Nothing is
    // allocated. Error, and no sequence changed: no sequence, or one of another engine, a token outside the
    // vocabulary, a sequence that is full, or a model file that changed on disk.
    void eval(const Row *rows, std::size_t count, float *logits);

private:
    struct Workspace;
    struct Projection;

    std::size_t eval_batch(const Row *rows, std::size_t count, float *logits);
    void embed();
    void attend(const Layer &layer, std::size_t index);
    void attend_heads(std::size_t layer, std::size_t row, std::size_t head, std::size_t count, unsigned thread);
    void finish_head(const Projection &projection, const std::vector<float> &norm, std::size_t head, bool is_rotated);
    void cache_head(std::size_t layer, std::size_t head);
    void feed_forward(const Layer &layer);
    void normalize(const std::vector<float> &weight);
    void prepare(Activations &activations, const float *x, std::size_t columns);
    void multiply(const Activations &x, const Projection *projections, std::size_t count);
    void add_branch(const Projection &projection, std::size_t begin, std::size_t end);
    void add_to_residual(const Linear &linear, const Activations &x);
    std::size_t logits_of_batch(float *logits);

    std::uint64_t id_;  // no two engines of a process have the same, closed ones included
    EngineOptions options_;
    Model model_;
    ThreadPool pool_;
    std::unique_ptr<Workspace> workspace_;
};

}  // namespace irq
