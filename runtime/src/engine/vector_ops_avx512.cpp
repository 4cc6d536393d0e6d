#include "vector_ops.inl"

namespace irq {

const VectorOps &vector_ops_avx512();
const VectorOps &vector_ops_avx512() { return ops; }

}  // namespace irq
