// The functions of irq/icq.h on one instruction set: one source (icq.inl), compiled once for each.
#pragma once

#include "irq/icq.h"

namespace irq {

struct IcqKernels {
    decltype(&icq_search) search;
    decltype(&icq_plain_entropy) plain_entropy;
    decltype(&icq_encode) encode;
};

extern const IcqKernels icq_baseline;  // what every processor of the architecture has
#if defined(__x86_64__)
extern const IcqKernels icq_avx2;
extern const IcqKernels icq_avx512;
#endif

}  // namespace irq
