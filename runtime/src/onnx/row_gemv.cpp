#include "row_gemv.h"

namespace irq::onnx {

const RowGemv *row_gemv_for([[maybe_unused]] const Matrix &w) {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512 && irq_codebook_bits[w.codebook] == 4) return &row_gemv_avx512;
#endif
    return nullptr;
}

}  // namespace irq::onnx
