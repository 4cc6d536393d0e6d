// Compiled for every AArch64.
#include "neon_ops.h"
#include "simd_gemm.h"

namespace irq {

const KernelTable neon_kernels = {prepare_token<Neon>, decode_rows<Neon>, gemv_rows<Neon>, gemm_rows<Neon>};

}  // namespace irq
