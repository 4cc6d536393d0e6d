// Scalar dequantisation: the reference the other instruction sets are held to.
#include "irq/kernels.h"

namespace irq {
namespace {

const float *levels_of(irq_codebook codebook) {
    static const float *const levels[] = {irq_nf4_levels,  irq_nf3_levels,  irq_nf2_levels,
                                          irq_int4_levels, irq_int3_levels, irq_int2_levels};
    return levels[codebook];
}

// Element j of a block packed in 2- or 4-bit planes: byte j % stride, shifted by its plane.
template <unsigned Bits>
unsigned plane_code(const std::uint8_t *block, std::size_t stride, std::size_t j) {
    return (block[j % stride] >> (Bits * (j / stride))) & ((1u << Bits) - 1);
}

template <unsigned Bits>
unsigned code_at(const std::uint8_t *block, std::size_t block_size, std::size_t j) {
    if constexpr (Bits == 3) {
        const std::size_t low_bytes = block_size / 4;
        const unsigned high = (block[low_bytes + j / 8] >> (j % 8)) & 1u;
        return plane_code<2>(block, low_bytes, j) | high << 2;
    } else {
        return plane_code<Bits>(block, block_size * Bits / 8, j);
    }
}

template <unsigned Bits>
void dequantize_blocks(std::size_t blocks, std::size_t block_size, const float *levels,
                       const std::uint8_t *codes, const float *scale, const float *tau,
                       float *weight) {
    for (std::size_t b = 0; b < blocks; ++b) {
        const float offset = tau == nullptr ? 0.0f : tau[b];
        for (std::size_t j = 0; j < block_size; ++j) {
            const float scaled = scale[b] * levels[code_at<Bits>(codes, block_size, j)];
            weight[j] = scaled + offset;
        }
        codes += block_size * Bits / 8;
        weight += block_size;
    }
}

void dequantize_int8(std::size_t blocks, std::size_t block_size, const std::uint8_t *codes,
                     const float *scale, float *weight) {
    for (std::size_t i = 0; i < blocks * block_size; ++i) {
        weight[i] = scale[i / block_size] * static_cast<float>(static_cast<std::int8_t>(codes[i]));
    }
}

}  // namespace

bool is_valid(const BlockShape &shape) {
    if (shape.codebook < 0 || shape.codebook >= IRQ_CODEBOOK_COUNT) return false;
    const bool size_known =
        shape.block_size == 32 || (shape.block_size == 64 && shape.codebook != IRQ_INT8);
    return size_known && shape.columns % shape.block_size == 0;
}

void dequantize(const BlockShape &shape, const std::uint8_t *codes, const float *scale,
                const float *tau, float *weight) {
    const std::size_t blocks = shape.rows * shape.blocks_per_row();
    switch (irq_codebook_bits[shape.codebook]) {
        case 8: return dequantize_int8(blocks, shape.block_size, codes, scale, weight);
        case 4:
            return dequantize_blocks<4>(blocks, shape.block_size, levels_of(shape.codebook), codes,
                                        scale, tau, weight);
        case 3:
            return dequantize_blocks<3>(blocks, shape.block_size, levels_of(shape.codebook), codes,
                                        scale, tau, weight);
        default:
            return dequantize_blocks<2>(blocks, shape.block_size, levels_of(shape.codebook), codes,
                                        scale, tau, weight);
    }
}

}  // namespace irq
