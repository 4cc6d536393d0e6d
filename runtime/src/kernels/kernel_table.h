// What one instruction set offers, and what they share. The public functions of kernels.h look the table
// of the active set up and call through it.
#pragma once

#include "irq/kernels.h"

namespace irq {

struct KernelTable {
    // Fills `out` from x (columns,); the arrays behind it are `stride` columns long.
    void (*prepare)(const float *x, std::size_t columns, std::size_t stride, bool for_gemv, const TokenInput &out);
    void (*dequantize_rows)(const Matrix &w, std::size_t r0, std::size_t r1, float *weight);
    void (*gemv)(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1,
                 float *y, Store store);
    void (*gemm)(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
                 Store store);
};

extern const KernelTable scalar_kernels;   // words
extern const KernelTable scalar8_kernels;  // bytes
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;    // words
extern const KernelTable avx512_kernels;  // bytes
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;     // words
extern const KernelTable dotprod_kernels;  // bytes
#endif

// Fast mode comes in two forms; prepare, gemv and gemm of a set agree on one.
//
// Words: 16 bits by 16. level[q] is step * code[q], exact for the integer codebooks, 15 bits for the others.
// The sum of 64 products of a weight's and an input's code fits 32 bits: 64 * 16383 * 2047 < 2^31.
struct CodeTable {
    std::int16_t code[16];
    float step;
};

constexpr int largest_weight_code = 16383, largest_input_code = 2047;

// Bytes: 8 bits, unsigned or less their bias, by signed 8 bits. level[q] is offset + step * code[q], exact for the
// integer codebooks; the others are the least-squares fit under a Gaussian's code frequencies (NMSE of the weights
// 1.1e-5). An input is scale * (high + low / 256) for gemv, scale * code for gemm.
struct ByteTable {
    std::uint8_t code[16];
    std::uint8_t bias;  // about the code of level 0; code - bias + 128 still fits 8 bits
    float step, offset;
};

constexpr int largest_byte = 127, byte_bias = 128;
constexpr float low_terms = 256;

// Up to here gemm multiplies token by token, as gemv would: decoding costs more than it saves.
inline bool is_few(const Activations &x) { return x.tokens() <= (x.mode() == Mode::fast ? few_tokens : 4); }

// What the codes of a block format stand for. Levels of 8-bit formats are their signed codes: null.
const float *levels_of(const Matrix &w);
const CodeTable &code_table_of(const Matrix &w);
const ByteTable &byte_table_of(const Matrix &w);

// irq_dynamic_map by bytes: (4, 256), byte b of the little-endian float of every index.
const std::uint8_t *dynamic_map_planes();

// Bits per code of a block format.
int code_bits(const Matrix &w);

// True if the format has an offset beside its scale.
bool has_tau(const Matrix &w);

}  // namespace irq
