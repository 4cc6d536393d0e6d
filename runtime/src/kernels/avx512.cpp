// Compiled with -mavx512{f,bw,dq,vl,vnni,vbmi} -mavx2 -mfma -mf16c -mbmi2; runs only where cpu.cpp says so.
#include "avx512_ops.h"
#include "simd_gemm_fast.h"

namespace irq {

const KernelTable avx512_kernels = {prepare_token<Avx512>, decode_rows<Avx512>, gemv_rows<Avx512>,
                                    gemm_rows_by_mode<Avx512>};

}  // namespace irq
