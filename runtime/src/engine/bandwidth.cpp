#include "irq/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace irq {

double read_bandwidth(ThreadPool &pool, std::size_t size, int passes) {
    constexpr std::size_t chunk = 1 << 17;  // words: 1 MiB
    std::vector<std::uint64_t> words(std::max<std::size_t>(size / sizeof(std::uint64_t) / chunk, 1) * chunk, 1);
    std::atomic<std::uint64_t> total{0};  // so that no read can be left out
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) {
        const auto started = std::chrono::steady_clock::now();
        pool.for_each(words.size() / chunk, [&](std::size_t i, unsigned) {
            const std::uint64_t *from = words.data() + i * chunk;
            std::uint64_t sums[8] = {};
            for (std::size_t k = 0; k < chunk; k += 8) {
                for (std::size_t j = 0; j < 8; ++j) sums[j] += from[k + j];
            }
            for (const std::uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
        best = std::max(best, static_cast<double>(words.size() * sizeof(std::uint64_t)) / seconds.count());
    }
    return total.load() == 0 ? 0 : best;
}

}  // namespace irq
