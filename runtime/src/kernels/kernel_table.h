// What one instruction set offers, and what they share. The public functions of kernels.h look the table
// of the active set up and call through it.
#pragma once

#include "irq/kernels.h"

namespace irq {

struct KernelTable {
    // Fills `out` from x (columns,); the arrays behind it are `stride` columns long.
    void (*prepare)(const float *x, std::size_t columns, std::size_t stride, const TokenInput &out);
    void (*dequantize_rows)(const Matrix &w, std::size_t r0, std::size_t r1, float *weight);
    void (*gemv)(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1,
                 float *y, Store store);
    void (*gemm)(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
                 Store store);
};

extern const KernelTable scalar_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;
#endif

// Fast mode replaces level[q] by step * code[q]: exact for the integer codebooks, 15 bits for the others.
// The sum of 64 products of a weight's and an input's code fits 32 bits: 64 * 16383 * 2047 < 2^31.
struct CodeTable {
    std::int16_t code[16];
    float step;
};

constexpr int largest_weight_code = 16383, largest_input_code = 2047;

// What the codes of a block format stand for. Levels of 8-bit formats are their signed codes: null.
const float *levels_of(const Matrix &w);
const CodeTable &code_table_of(const Matrix &w);

// irq_dynamic_map by bytes: (4, 256), byte b of the little-endian float of every index.
const std::uint8_t *dynamic_map_planes();

// Bits per code of a block format.
int code_bits(const Matrix &w);

// True if the format has an offset beside its scale.
bool has_tau(const Matrix &w);

}  // namespace irq
