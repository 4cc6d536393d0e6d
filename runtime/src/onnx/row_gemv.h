// One token, y = W x with W in 4 bits, straight from ONNX bytes.
//
// 64 bytes of codes are 16 words of 32 bits, and nibble i of every word is brought to the low bits by shifts alone: a
// look-up reads no others. So lane d of vector i meets element 8 d + i (NF4: i ^ 1) of 128, and x, put into that order
// once a call, makes up for it. Scales and taus may be of any storage; a few hundred at a time are expanded into L1.
#pragma once

#include "irq/kernels.h"

namespace irq::onnx {

struct RowGemv {
    // Floats that `prepare` writes for K columns: x in order, padded with zeros, then its sums over blocks.
    std::size_t (*size)(const Matrix &w);

    // x (K,), floats or fp16 bits.
    void (*prepare)(const Matrix &w, const void *x, bool is_half, float *prepared);

    // y[r] for r in [r0, r1).
    void (*multiply)(const Matrix &w, const float *prepared, std::size_t r0, std::size_t r1, float *y);
};

constexpr std::size_t most_blocks_of_a_row = 4096;

// Null where there is none: other sets of instructions, other codes and wider rows take the kernels of irq/kernels.h.
const RowGemv *row_gemv_for(const Matrix &w);

#if defined(__x86_64__)
extern const RowGemv row_gemv_avx512;
#endif

}  // namespace irq::onnx
