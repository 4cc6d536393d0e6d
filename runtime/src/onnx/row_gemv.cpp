#include "row_gemv.h"

namespace irq::onnx {

const RowGemv *row_gemv_for([[maybe_unused]] const Matrix &w) {
#if defined(__x86_64__)
    const bool is_narrow = w.blocks_per_row() <= most_blocks_of_a_row && irq_codebook_bits[w.codebook] == 4;
    if (active_isa() == Isa::avx512 && is_narrow) return &row_gemv_avx512;
#endif
    return nullptr;
}

}  // namespace irq::onnx
