// Compiled with -mavx2 -mfma -mf16c; runs only where cpu.cpp says so.
#include "avx2_ops.h"
#include "simd_gemm_fast.h"

namespace irq {

const KernelTable avx2_kernels = {prepare_token<Avx2>, decode_rows<Avx2>, gemv_rows<Avx2>, gemm_rows_by_mode<Avx2>};

}  // namespace irq
