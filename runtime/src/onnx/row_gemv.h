// One token, y = W x with W in 4 bits, straight from ONNX bytes.
//
// 64 bytes of codes are 16 words of 32 bits, and nibble i of every word is brought to the low bits by shifts alone: a
// look-up reads no others. So lane d of vector i meets element 8 d + i (NF4: i ^ 1) of 128, and x, put into that order
// once a thread, makes up for it. Scales and taus may be of any storage; a few hundred at a time are expanded into L1.
#pragma once

#include <algorithm>
#include <atomic>

#include "irq/kernels.h"

namespace irq::onnx {

struct Rows {
    std::size_t begin, end;
    bool is_empty() const { return begin == end; }
};

// The rows of one call. Its threads take a stretch at a time, each the next one shortly before it ends one, so that
// memory need not wait in between.
class RowQueue {
  public:
    RowQueue(std::size_t rows, std::size_t at_a_time) : rows_(rows), at_a_time_(at_a_time) {}

    std::size_t most_takers() const { return (rows_ + at_a_time_ - 1) / at_a_time_; }

    // Empty when none are left.
    Rows take() {
        const std::size_t begin = std::min(rows_, next_.fetch_add(at_a_time_, std::memory_order_relaxed));
        return {begin, std::min(rows_, begin + at_a_time_)};
    }

  private:
    const std::size_t rows_, at_a_time_;
    std::atomic<std::size_t> next_{0};
};

struct RowGemv {
    // Floats that a thread needs for K columns: x in order, padded with zeros, then its sums over blocks.
    std::size_t (*size)(const Matrix &w);

    // y[r] for the rows taken from `queue` until it is empty. x (K,): floats or fp16 bits. prepared (size(w),): of
    // this thread alone, written.
    void (*multiply)(const Matrix &w, const void *x, bool is_half, float *prepared, RowQueue *queue, float *y);
};

constexpr std::size_t most_blocks_of_a_row = 4096;

// Null where there is none: other sets of instructions, other codes and wider rows take the kernels of irq/kernels.h.
const RowGemv *row_gemv_for(const Matrix &w);

#if defined(__x86_64__)
extern const RowGemv row_gemv_avx512;
#endif

}  // namespace irq::onnx
