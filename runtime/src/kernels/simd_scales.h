// Scales and taus of blocks, expanded into L1 shortly before their rows are read: 8-bit indices stay 8-bit in
// memory, which is what a memory-bound product wants.
#pragma once

#include "block_layout.h"

namespace irq {
namespace {

constexpr std::size_t max_blocks = 1024;  // of a row that are multiplied in one go
constexpr std::size_t slack = 64;         // floats that vector stores may write behind expanded scales

constexpr std::size_t larger(std::size_t a, std::size_t b) { return a > b ? a : b; }
constexpr std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Hardware prefetchers stop at page borders, which rows meet every few hundred nanoseconds.
constexpr std::size_t codes_ahead = 6144;

// Asks for the cache lines of [address + ahead, ... + bytes); may lie outside of any array. Inlined by force: GCC
// takes a function that only prefetches for one without effects and leaves calls of it out.
[[gnu::always_inline]] inline void prefetch(const void *address, std::size_t ahead, std::size_t bytes) {
    const auto start = reinterpret_cast<std::uintptr_t>(address) + ahead;
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void *>(start + i));
}

template <class S>
void expand_values(const BlockValues &v, std::size_t k, std::size_t n, float *out) {
    const auto *bytes = static_cast<const std::uint8_t *>(v.values);
    switch (v.storage) {
        case Storage::none:
            for (std::size_t i = 0; i < n; ++i) out[i] = 0.0f;
            return;
        case Storage::f32: std::memcpy(out, bytes + 4 * k, n * sizeof(float)); return;
        case Storage::f16: return S::expand_f16(bytes + 2 * k, n, out);
        default: break;
    }
    for (const std::size_t end = k + n; k < end;) {  // one group, one absmax at a time
        const std::size_t group = k / IRQ_GROUP_SIZE;
        const std::size_t count = smaller((group + 1) * IRQ_GROUP_SIZE, end) - k;
        S::expand_dq8(bytes + k, count, load_as<float>(v.absmax + group), v.offset, v.round_to_f16, out);
        k += count;
        out += count;
    }
}

[[gnu::always_inline]] inline void prefetch_values(const BlockValues &v, std::size_t k, std::size_t n) {
    constexpr std::size_t sizes[] = {0, 4, 2, 1};
    const std::size_t size = sizes[static_cast<int>(v.storage)];
    prefetch(v.values, k * size, n * size);
    if (v.storage == Storage::dq8) prefetch(v.absmax, k / IRQ_GROUP_SIZE * sizeof(float), 1);
}

// Scales and taus of n blocks from block k on, counted over the matrix. May write `slack` floats more.
template <class S, class L>
void expand(const Matrix &w, std::size_t k, std::size_t n, float *scale, float *tau) {
    if constexpr (L::lead != 0) {
        const std::uint8_t *block = static_cast<const std::uint8_t *>(w.data) + k * L::stride;
        for (std::size_t i = 0; i < n; ++i, block += L::stride) {
            scale[i] = S::load_half(block);
            if constexpr (L::adds_tau) tau[i] = S::load_half(block + 2);
        }
    } else {
        expand_values<S>(w.scale, k, n, scale);
        if constexpr (L::adds_tau) expand_values<S>(w.tau, k, n, tau);
        // Three turns ahead: one is shorter than memory takes when it is busy with codes.
        prefetch_values(w.scale, k + 3 * n, n);
        if constexpr (L::adds_tau) prefetch_values(w.tau, k + 3 * n, n);
    }
}

// The expanded scales and taus of a stretch of blocks, counted over the matrix. It moves along with the rows and is
// filled a piece at a time: codes go on arriving from memory while a piece is expanded, which many pieces in a
// row would stop. Pieces do not cross the groups of dq8.
// Narrow rows keep to the first 2048 or so of each array, to leave L1 to other things.
template <class S, class L>
class ScaleWindow {
  public:
    // n: of blocks that are reached at once, at most `most`.
    ScaleWindow(const Matrix &w, std::size_t n)
        : w_(w), blocks_(w.rows * w.blocks_per_row()), length_(larger(n, usual) + piece) {}

    // What `reach` reads first when it begins with block k.
    [[gnu::always_inline]] void prefetch_from(std::size_t k) const {
        if constexpr (L::lead != 0) return;
        prefetch_values(w_.scale, k, 4 * piece);
        if constexpr (L::adds_tau) prefetch_values(w_.tau, k, 4 * piece);
    }

    // Makes blocks [k, k + n) readable.
    void reach(std::size_t k, std::size_t n) {
        if (k + n <= end_) return;
        if (k < begin_ || k + n > begin_ + length_) begin_ = end_ = k / piece * piece;
        for (; end_ < k + n; end_ += piece) {
            const std::size_t at = end_ - begin_;
            expand<S, L>(w_, end_, smaller(piece, blocks_ - end_), scale_ + at, tau_ + at);
        }
    }

    const float *scale(std::size_t k) const { return scale_ + (k - begin_); }
    const float *tau(std::size_t k) const { return tau_ + (k - begin_); }

  private:
    // Where scales lie among the codes, expanding reads those: not further than they are asked for.
    static constexpr std::size_t piece = L::lead == 0 ? IRQ_GROUP_SIZE : 32;
    static constexpr std::size_t usual = 2048, most = 4 * max_blocks, capacity = most + 2 * piece + slack;

    const Matrix &w_;
    const std::size_t blocks_, length_;
    std::size_t begin_ = blocks_, end_ = 0;  // nothing
    alignas(64) float scale_[capacity], tau_[capacity];
};

}  // namespace
}  // namespace irq
