// irq_runtime._native.icq_search: blocks in, scale and offset out, over a few threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "irq/icq.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::size_t kMaxCandidates = 4096;

using Blocks = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pairs = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Pairs icq_search(Blocks blocks, Floats levels, Floats midpoints, int zero_code, float half_range, Table table,
                 Floats factors, bool by_entropy, bool tie_first, std::size_t threads) {
    const std::size_t n = blocks.shape(0), block_size = blocks.shape(1), codes = levels.shape(0);
    if ((block_size != 32 && block_size != 64) || table.shape(0) != block_size + 1 || codes < 2 || codes > 16 ||
        midpoints.shape(0) + 1 != codes || zero_code < 0 || static_cast<std::size_t>(zero_code) >= codes ||
        factors.shape(0) < 1 || factors.shape(0) > kMaxCandidates || threads < 1) {
        throw nb::value_error("blocks, codebook, table and factors do not fit together");
    }
    const irq::IcqSearch search{block_size,       static_cast<int>(codes), levels.data(),    midpoints.data(),
                                zero_code,        half_range,              table.data(),     factors.data(),
                                factors.shape(0), by_entropy,              tie_first};
    auto data = std::make_unique<float[]>(2 * n);
    {
        nb::gil_scoped_release unlocked;
        const std::size_t share = (n + threads - 1) / threads;
        const auto work = [&](std::size_t begin) {
            const std::size_t end = std::min(n, begin + share);
            irq::icq_search(search, blocks.data() + begin * block_size, end - begin, data.get() + begin,
                            data.get() + n + begin);
        };
        std::vector<std::thread> others;
        for (std::size_t begin = share; begin < n; begin += share) others.emplace_back(work, begin);
        if (n > 0) work(0);
        for (std::thread &other : others) other.join();
    }
    float *raw = data.release();
    return Pairs(raw, {2, n}, nb::capsule(raw, [](void *p) noexcept { delete[] static_cast<float *>(p); }));
}

}  // namespace

void bind_icq(nb::module_ &module) {
    module.def("icq_search", &icq_search, "blocks"_a, "levels"_a, "midpoints"_a, "zero_code"_a, "half_range"_a,
               "table"_a, "factors"_a, "by_entropy"_a, "tie_first"_a, "threads"_a,
               "Scale and offset of blocks float32 (n, B), as float32 (2, n): irq_export.icq_search, steps 1 to 6, "
               "bit for bit. half_range is 0 for nf codebooks.");
}
