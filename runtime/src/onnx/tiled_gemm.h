// Many tokens at once: panels of W are decoded into L2, transposed on the way, and multiplied from there.
//
//   pack      A -> tiles of up to `tile_tokens` tokens, so that a tile reads its inputs in one stream
//   multiply  for 1024 columns at a time:  decode 32 (AVX2: 16) rows -> for every tile: sums in registers
//
// The kernels of irq/kernels.h decode along a row, which suits files that many programs map; here the lanes of
// a register are rows. 32 bits of 16 rows are loaded at a time, and because a panel may store its columns in any
// order, the order of elements inside an ONNX block costs nothing: these functions read A as it is.
#pragma once

#include "irq/kernels.h"

namespace irq::onnx {

struct TiledGemm {
    std::size_t tile_tokens;

    // Tile `tile` of A (tokens, k), floats or fp16 bits, into `packed` (tokens * k floats for all tiles).
    void (*pack)(const void *a, bool is_half, std::size_t tokens, std::size_t k, std::size_t tile, float *packed);

    // y[t * ldy + r] for all tokens and r in [r0, r1). W holds ONNX bytes (formats/spec/irq-onnx.md, section 2).
    void (*multiply)(const Matrix &w, const float *packed, std::size_t tokens, std::size_t r0, std::size_t r1,
                     float *y, std::size_t ldy);

    std::size_t tiles(std::size_t tokens) const { return (tokens + tile_tokens - 1) / tile_tokens; }
};

// Null where there is none: without AVX2, and for 2- and 3-bit blocks of 32.
const TiledGemm *tiled_gemm_for(const Matrix &w);

#if defined(__x86_64__)
extern const TiledGemm tiled_gemm_avx2, tiled_gemm_avx512;
#endif

}  // namespace irq::onnx
