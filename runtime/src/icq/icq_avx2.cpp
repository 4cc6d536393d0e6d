#include "icq.inl"

namespace irq {

const IcqKernels icq_avx2 = kernels;

}  // namespace irq
