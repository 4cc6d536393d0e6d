#include "vector_ops.inl"

namespace irq {

const VectorOps &vector_ops_avx2();
const VectorOps &vector_ops_avx2() { return ops; }

}  // namespace irq
