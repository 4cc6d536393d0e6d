// How fast this machine reads memory: what decoding is measured against.
#pragma once

#include <cstddef>

#include "irq/threads.h"

namespace irq {

// Bytes per second of the best of `passes` sweeps over a fresh buffer of `size` bytes, all threads reading.
// The buffer should be several times the last-level cache. Throws std::bad_alloc.
double read_bandwidth(ThreadPool &pool, std::size_t size, int passes);

}  // namespace irq
