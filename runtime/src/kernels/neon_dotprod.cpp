// Compiled with -march=armv8.2-a+dotprod; runs only where cpu.cpp says so.
#include "neon_gemm.h"

namespace irq {

const KernelTable dotprod_kernels = {prepare_bytes, decode_rows<Neon>, gemv_rows<Neon, ByteDot>, gemm_bytes};

}  // namespace irq
