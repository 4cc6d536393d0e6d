#include "tiled_gemm.h"

namespace irq::onnx {

const TiledGemm *tiled_gemm_for(const Matrix &w) {
    const int bits = irq_codebook_bits[w.codebook];
    if (bits < 4 && w.block_size != 64) return nullptr;
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return &tiled_gemm_avx512;
    if (active_isa() == Isa::avx2) return &tiled_gemm_avx2;
#endif
    return nullptr;
}

}  // namespace irq::onnx
