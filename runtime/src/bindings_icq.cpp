// irq_runtime._native.IcqBook: blocks are searched, fitted and encoded, over a few threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

#include "irq/icq.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Blocks = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// An array for Python that owns its data.
template <typename Number>
auto array(std::unique_ptr<Number[]> data, std::size_t rows, std::size_t columns) {
    Number *raw = data.release();
    nb::capsule owner(raw, [](void *p) noexcept { delete[] static_cast<Number *>(p); });
    return nb::ndarray<nb::numpy, Number, nb::ndim<2>>(raw, {rows, columns}, owner);
}

// Blocks that a thread takes at a time. Sums are over these first, so they do not depend on the threads.
constexpr std::size_t share = 1024;

// Calls work(share number, first block, end) for all shares of n blocks, on as many threads as the system gives.
template <typename Work>
void share_out(std::size_t n, std::size_t threads, const Work &work) {
    nb::gil_scoped_release unlocked;
    const std::size_t shares = (n + share - 1) / share;
    std::atomic<std::size_t> next{0};
    const auto run = [&] {
        for (std::size_t i; (i = next++) < shares;) work(i, i * share, std::min(n, (i + 1) * share));
    };
    const std::size_t wanted = std::min(threads, shares);
    std::vector<std::thread> others;
    others.reserve(wanted);
    try {
        while (others.size() + 1 < wanted) others.emplace_back(run);
    } catch (const std::system_error &) {  // those that began, and this one, take all the shares
    }
    run();
    for (std::thread &other : others) other.join();
}

class Book {
  public:
    Book(Floats levels, Floats midpoints, std::size_t zero_code, float half_range, Table table)
        : levels_(levels.data(), levels.data() + levels.shape(0)),
          midpoints_(midpoints.data(), midpoints.data() + midpoints.shape(0)),
          table_(table.data(), table.data() + table.shape(0)) {
        const std::size_t codes = levels_.size(), block_size = table_.size() - 1;
        if ((codes != 4 && codes != 8 && codes != 16) || (block_size != 32 && block_size != 64) ||
            midpoints_.size() + 1 != codes || zero_code >= codes) {
            throw nb::value_error("levels, midpoints, zero code and table do not fit together");
        }
        book_ = {block_size, codes, levels_.data(), midpoints_.data(), zero_code, half_range, table_.data()};
    }
    Book(const Book &) = delete;  // book_ points into it
    Book &operator=(const Book &) = delete;

    auto search(Blocks blocks, Floats factors, bool by_entropy, bool tie_first, bool refit, bool with_tau,
                std::size_t threads) const {
        const std::size_t n = count(blocks);
        if (factors.shape(0) > irq::icq_max_candidates) throw nb::value_error("too many candidates");
        const irq::IcqSearch how{factors.data(), factors.shape(0), by_entropy, tie_first, refit, with_tau};
        auto pairs = std::make_unique<float[]>(2 * n);
        share_out(n, threads, [&](std::size_t, std::size_t b, std::size_t end) {
            irq::icq_search(book_, how, blocks.data() + b * book_.block_size, end - b, pairs.get() + b,
                            pairs.get() + n + b);
        });
        return array(std::move(pairs), 2, n);
    }

    std::int64_t plain_entropy(Blocks blocks, std::size_t threads) const {
        std::atomic<std::int64_t> entropy{0};
        share_out(count(blocks), threads, [&](std::size_t, std::size_t b, std::size_t end) {
            entropy += irq::icq_plain_entropy(book_, blocks.data() + b * book_.block_size, end - b);
        });
        return entropy;
    }

    auto encode(Blocks blocks, Floats scale, Floats tau, std::size_t threads) const {
        const std::size_t n = count(blocks), bytes = book_.block_size * bits() / 8;
        if (scale.shape(0) != n || tau.shape(0) != n) throw nb::value_error("a scale and an offset per block");
        auto packed = std::make_unique<std::uint8_t[]>(n * bytes);
        std::vector<irq::IcqMeasure> measures((n + share - 1) / share);
        share_out(n, threads, [&](std::size_t i, std::size_t b, std::size_t end) {
            measures[i] = irq::icq_encode(book_, blocks.data() + b * book_.block_size, scale.data() + b,
                                          tau.data() + b, end - b, packed.get() + b * bytes);
        });
        irq::IcqMeasure all{0, 0.0, 0.0};
        for (const irq::IcqMeasure &measure : measures) {
            all.entropy += measure.entropy;
            all.error += measure.error;
            all.norm += measure.norm;
        }
        return nb::make_tuple(array(std::move(packed), n, bytes), all.entropy, all.error, all.norm);
    }

  private:
    std::size_t bits() const { return book_.codes == 16 ? 4 : book_.codes == 8 ? 3 : 2; }

    std::size_t count(const Blocks &blocks) const {
        if (blocks.shape(1) != book_.block_size) throw nb::value_error("blocks of another size");
        return blocks.shape(0);
    }

    std::vector<float> levels_, midpoints_;
    std::vector<std::int64_t> table_;
    irq::IcqBook book_;
};

}  // namespace

void bind_icq(nb::module_ &module) {
    nb::class_<Book>(module, "IcqBook",
                     "A codebook, with the search of irq_export.icq_search for it, bit for bit. Blocks are float32 "
                     "(n, B), finite, magnitudes at most 2**125; entropies are in fixed point.")
        .def(nb::init<Floats, Floats, std::size_t, float, Table>(), "levels"_a, "midpoints"_a, "zero_code"_a,
             "half_range"_a, "table"_a, "half_range is 0 for nf codebooks; table is (B + 1,), entropy of a count.")
        .def("search", &Book::search, "blocks"_a, "factors"_a, "by_entropy"_a, "tie_first"_a, "refit"_a,
             "with_tau"_a, "threads"_a, "Scale and offset, float32 (2, n). Without factors nothing is searched.")
        .def("plain_entropy", &Book::plain_entropy, "blocks"_a, "threads"_a,
             "Entropy of the codes at the absolute maximum, summed over blocks.")
        .def("encode", &Book::encode, "blocks"_a, "scale"_a, "tau"_a, "threads"_a,
             "Packed codes uint8 (n, bytes) at scale and offset (n,); their entropy, squared error and the "
             "squared norm, summed over blocks.");
}
