// Compiled with -mavx512{f,bw,dq,vl,vnni,vbmi} -mavx2 -mfma -mf16c -mbmi2; runs only where cpu.cpp says so.
#include "avx512_gemm.h"

namespace irq {

const KernelTable avx512_kernels = {prepare_bytes, decode_rows<Avx512>, gemv_rows<Avx512, ByteDot>, gemm_bytes};

}  // namespace irq
