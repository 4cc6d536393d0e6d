// Kernels over weights as they lie in the file: dequantise, matrix times vector, matrix times matrix.
//
//   Matrix       a view of the mapped bytes of one weight; costs nothing to make (formats/spec/irq-blocks.md)
//   Activations  the inputs, prepared once and shared by every matrix that reads them (q/k/v, gate/up)
//   gemv, gemm   any range of rows: threads split the rows, nothing is shared but read-only memory
//
// Two modes. `exact`: float32 weights by table look-up, float32 sums. `fast`: integer sums inside a block,
// float32 across blocks, of inputs in 12 bits and 16-bit tables, or (avx512, dotprod) of inputs in 8 bits
// (gemv: twice 8) and 8-bit tables; float carriers (f32, f16, bf16) are exact in both. No function here allocates,
// except the constructor of Activations. Pointers need only their element's alignment. Arrays are dense and row-major.
#pragma once

#include <cstddef>
#include <cstdint>

#include "irq/codebooks.h"
#include "irq/cpu.h"

namespace irq {

// blocks: packed codes with scales and offsets in arrays of their own (irq files). The others are
// ggml's: values in a row, or blocks of 32 that carry their own scale.
enum class Format : std::uint8_t { blocks, f32, f16, bf16, q8_0, q4_0, q4_1 };

enum class Storage : std::uint8_t { none, f32, f16, dq8 };

// One value per block, (rows, blocks_per_row): the scale or the offset tau.
struct BlockValues {
    Storage storage = Storage::none;  // none: all 0 (tau only)
    const void *values = nullptr;     // float, fp16 bits or uint8 index
    const float *absmax = nullptr;    // dq8: (ceil(rows * blocks_per_row / 256),)
    float offset = 0;                 // dq8: added
    bool round_to_f16 = false;        // dq8: then rounded to fp16 and widened
};

struct Matrix {
    Format format = Format::f32;
    irq_codebook codebook = IRQ_NF4;  // Format::blocks
    std::size_t block_size = 1;       // Format::blocks: 32 or 64 (int8: 32); q8_0, q4_0, q4_1: 32; floats: 1
    std::size_t rows = 0;             // out
    std::size_t columns = 0;          // in, a multiple of block_size
    const void *data = nullptr;       // (rows, row_bytes()): codes, values or ggml blocks
    BlockValues scale, tau;           // Format::blocks

    std::size_t blocks_per_row() const { return columns / block_size; }
    std::size_t row_bytes() const;    // of data
    std::size_t total_bytes() const;  // of data, scale and tau together: what a product reads
};

// True if format, codebook, block size, storage and columns go together and no needed pointer is null.
bool is_valid(const Matrix &matrix);

// A matrix in one of ggml's formats.
Matrix stock_matrix(Format format, std::size_t rows, std::size_t columns, const void *data);

enum class Mode : std::uint8_t { exact, fast };

inline constexpr std::size_t group_size = 32;  // the smaller block: inputs have a sum for each
inline constexpr std::size_t span_size = 64;   // the larger block: a sum and one integer scale for each
inline constexpr std::size_t few_tokens = 8;   // up to here fast mode prepares inputs for gemv, beyond for gemm
inline constexpr std::size_t row_tile = 32;    // row ranges for threads are best cut at multiples of this

// One input vector. From `scale` on null in exact mode. Sets of instructions that multiply words read `codes`;
// those that multiply bytes read `bytes`, and where codes of weights are unsigned (AVX-512) the starts.
struct TokenInput {
    float *x;                  // (stride,)
    float *sum;                // (stride / 32,): of x
    float *span_sum;           // (stride / 64,): of x
    float *scale;              // (stride / 64,) or, bytes for gemm, (stride / 32,)
    std::int32_t *start;       // (stride / 32,): -128 times the sum of the bytes
    std::int32_t *span_start;  // (stride / 64,): the same, for gemv
    std::int16_t *codes;       // (stride,), -2047 to 2047: x is about scale * code
    std::int8_t *bytes;        // in the memory of codes. For gemm (stride,): x is about scale * byte. For gemv
                               // (stride / 64, 2, 64), high and low: scale * (high + low / 256)
    std::int8_t *pairs;        // (stride / 128, 2, 2, 2, 32), for gemv, of AVX-512: the same bytes, [high and low]
                               // [first and second half of a span] [two spans]
};

// Input vectors ready for products. Rows are padded with zeros to a multiple of 128 columns; the columns of
// every block have their sum beside them, because a block's offset meets its inputs only through it.
class Activations {
  public:
    Activations(std::size_t max_tokens, std::size_t max_columns, Mode mode);  // the one allocation
    ~Activations();
    Activations(Activations &&) noexcept;
    Activations &operator=(Activations &&) noexcept;
    Activations(const Activations &) = delete;
    Activations &operator=(const Activations &) = delete;

    // Takes x (tokens, columns) with row stride ldx, in floats. For several threads: `reshape` on one,
    // then `prepare_token` for every token on any. False, and nothing done, if it does not fit in
    // max_tokens * max_columns.
    bool prepare(const float *x, std::size_t ldx, std::size_t tokens, std::size_t columns);
    bool reshape(std::size_t tokens, std::size_t columns);
    void prepare_token(std::size_t t, const float *x);

    std::size_t tokens() const { return tokens_; }
    std::size_t columns() const { return columns_; }
    std::size_t stride() const { return stride_; }             // columns, padded
    Mode mode() const { return mode_; }

    TokenInput token(std::size_t t) const;

  private:
    void *memory_ = nullptr;
    TokenInput first_ = {};
    std::size_t max_tokens_ = 0, max_stride_ = 0, tokens_ = 0, columns_ = 0, stride_ = 0;
    Mode mode_ = Mode::exact;
};

// What happens to the values already in y. `add` fuses a LoRA branch: y += B (A x).
enum class Store : std::uint8_t { set, add };

// Rows [r0, r1) of w as float32 (r1 - r0, columns). Bit-equal to irq_formats.codecs.BlockCodec.decode
// (and to ggml's dequantisation) on every instruction set. Also the embedding look-up.
void dequantize_rows(const Matrix &w, std::size_t r0, std::size_t r1, float *weight);

// y[r] = sum_i w[r, i] * x[i] for r in [r0, r1); x is token `token` of the activations, whose columns
// must equal the matrix's, and which are few_tokens at most in fast mode. y is indexed by r itself.
void gemv(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
          Store store = Store::set);

// y[t * ldy + r] = sum_i w[r, i] * x[t, i] for all tokens t and r in [r0, r1). Panels of the weights are
// decoded into a buffer of fixed size on the stack (under 256 KiB), never the whole matrix.
void gemm(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
          Store store = Store::set);

}  // namespace irq
