// The instruction set for a machine without another, and the choice between them.
#include "icq.inl"

#include "irq/cpu.h"

namespace irq {

const IcqKernels icq_baseline = kernels;

namespace {

const IcqKernels &active() {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return icq_avx512;
    if (active_isa() == Isa::avx2) return icq_avx2;
#endif
    return icq_baseline;
}

}  // namespace

void icq_search(const IcqBook &book, const IcqSearch &search, const float *blocks, std::size_t n, float *scale,
                float *tau) {
    active().search(book, search, blocks, n, scale, tau);
}

std::int64_t icq_plain_entropy(const IcqBook &book, const float *blocks, std::size_t n) {
    return active().plain_entropy(book, blocks, n);
}

IcqMeasure icq_encode(const IcqBook &book, const float *blocks, const float *scale, const float *tau, std::size_t n,
                      std::uint8_t *packed) {
    return active().encode(book, blocks, scale, tau, n, packed);
}

}  // namespace irq
