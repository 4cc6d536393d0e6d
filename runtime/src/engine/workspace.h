// Scratch memory of an engine, sized once for the largest batch.
#pragma once

#include <vector>

#include "irq/engine.h"

namespace irq {

struct BatchRow {
    Sequence *sequence;
    std::size_t position;
    std::int32_t token;
    bool wants_logits;
};

// The middle of a LoRA branch: what A makes of the input.
struct Branch {
    std::vector<float> down;  // (count, rank)
    Activations input{1, 1, Mode::exact};
};

struct Engine::Workspace {
    Workspace(const Model &model, const EngineOptions &options);

    std::size_t batch, hidden, inner, head_dim, heads, kv_heads;
    std::size_t count = 0;               // rows in work
    std::vector<BatchRow> rows;          // (batch,)
    std::vector<float> x;                // (batch, hidden): the residual stream
    std::vector<float> normed;           // (batch, hidden)
    std::vector<float> q, k, v;          // (batch, heads, head_dim) or (batch, kv_heads, head_dim)
    std::vector<float> attended;         // (batch, heads, head_dim)
    std::vector<float> gate, up;         // (batch, inner)
    std::vector<float> cosines, sines;   // (batch, head_dim / 2)
    std::vector<float> scores;           // (threads, most_queries, padded(context))
    Activations hidden_input{1, 1, Mode::exact}, head_input{1, 1, Mode::exact}, inner_input{1, 1, Mode::exact};
    Branch branches[3];                  // of matrices that share an input
};

// One matrix of several that share an input: y (count, ldy) is set, or added to.
struct Engine::Projection {
    const Linear *linear;
    float *y;
    std::size_t ldy;
    Store store;
    Branch *branch;  // null if the matrix cannot have an adapter
};

}  // namespace irq
