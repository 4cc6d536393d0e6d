// Kernels over packed blocks (formats/spec/irq-blocks.md). Arrays are dense and row-major.
#pragma once

#include <cstddef>
#include <cstdint>

#include "irq/codebooks.h"

namespace irq {

// Geometry of a block-quantised matrix.
struct BlockShape {
    irq_codebook codebook;
    std::size_t block_size;  // 32 or 64; int8: 32
    std::size_t rows;        // out
    std::size_t columns;     // in, a multiple of block_size

    std::size_t blocks_per_row() const { return columns / block_size; }
    std::size_t row_bytes() const {
        return columns * static_cast<std::size_t>(irq_codebook_bits[codebook]) / 8;
    }
};

// True if codebook, block size and columns go together.
bool is_valid(const BlockShape &shape);

// w[o, i] = fl32(fl32(scale[o, b] * level[code]) + tau[o, b]); for int8 without tau.
//   codes (rows, row_bytes()), scale and tau (rows, blocks_per_row()), weight (rows, columns).
// Bit-equal to irq_formats.codecs.BlockCodec.decode. `shape` must be valid; tau may be null (zero).
void dequantize(const BlockShape &shape, const std::uint8_t *codes, const float *scale,
                const float *tau, float *weight);

}  // namespace irq
