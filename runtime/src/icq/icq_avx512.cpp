#include "icq.inl"

namespace irq {

const IcqKernels icq_avx512 = kernels;

}  // namespace irq
