// What is not a matrix product: norms, SwiGLU, attention. One source (vector_ops.inl), compiled once per
// instruction set, chosen as the kernels are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace irq {

inline constexpr std::size_t lanes = 16;        // positions of a tile of keys, on every machine
inline constexpr std::size_t most_queries = 4;  // that go over the keys together

// Keys and values of one head of one sequence. Keys lie transposed in tiles of 16 positions, so that 16
// scores grow side by side without horizontal sums; values lie by position, padded to whole vectors.
struct HeadCache {
    const void *keys;    // (tiles, head_dim, 16) float, or fp16 bits
    const void *values;  // (positions, padded(head_dim))
    bool is_half;
};

struct VectorOps {
    // out = weight * (x / sqrt(mean(x^2) + eps)); x and out may be the same.
    void (*rms_norm)(const float *x, const float *weight, std::size_t size, float eps, float *out);
    // gate = silu(gate) * up
    void (*swiglu)(float *gate, const float *up, std::size_t size);
    // out = softmax(q keys^T / sqrt(head_dim)) values over `length` positions; q and out (queries, head_dim), of heads
    // that share keys. Each has the bits it has alone.
    //   scores: scratch of most_queries * padded(length) floats; head_dim even, any size
    void (*attend)(const float *q, std::size_t queries, const HeadCache &cache, std::size_t head_dim,
                   std::size_t length, float *scores, float *out);
    // to[i * stride] = from[i], rounded to fp16 if is_half.
    void (*store)(const float *from, std::size_t size, bool is_half, std::size_t stride, void *to);
};

static inline std::size_t padded(std::size_t size) { return (size + lanes - 1) / lanes * lanes; }

const VectorOps &vector_ops();  // for active_isa()

}  // namespace irq
