// The baseline set, and the choice.
#include "irq/cpu.h"
#include "vector_ops.inl"

namespace irq {

#if defined(__x86_64__)
const VectorOps &vector_ops_avx2();
const VectorOps &vector_ops_avx512();
#endif

const VectorOps &vector_ops() {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return vector_ops_avx512();
    if (active_isa() == Isa::avx2) return vector_ops_avx2();
#endif
    return ops;
}

}  // namespace irq
