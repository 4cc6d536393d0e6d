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

// Fast mode replaces level[q] by offset + step * code[q] with 8-bit codes. The integer codebooks are
// exact; the normal-float ones are the least-squares fit under a Gaussian's code frequencies (NMSE of the
// weights 1.1e-5, of the order of the rounding of the inputs; scripts/fit_code_tables.py).
struct CodeTable {
    std::uint8_t code[16];  // unsigned, for vpdpbusd
    std::uint8_t bias;      // code - bias is signed and at most 128 in magnitude, for maddubs and sdot
    float step, offset;     // of the unsigned code
};

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
