// Holds the search of every instruction set of this machine to one that counts every candidate by itself, bit for
// bit, on blocks of many kinds; codes, measures and refits to the baseline's, which tests/export/test_icq_native.py
// holds to torch and numpy. Needs no files, so it also runs under qemu and sanitizers; buffers are of exact size.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "irq/codebooks.h"
#include "irq/cpu.h"
#include "irq/icq.h"

namespace {

std::mt19937 random_engine(5);

struct Book {
    std::vector<float> levels, midpoints;
    std::vector<std::int64_t> table;
    irq::IcqBook book;

    Book(const std::vector<float> &values, std::size_t block_size, float half_range)
        : levels(values), table(block_size + 1) {
        for (std::size_t k = 0; k + 1 < levels.size(); ++k) midpoints.push_back((levels[k] + levels[k + 1]) / 2);
        for (std::size_t n = 1; n <= block_size; ++n) {
            const double share = static_cast<double>(n) / static_cast<double>(block_size);
            table[n] = std::llround(-share * std::log2(share) * std::ldexp(1.0, 40));
        }
        const std::size_t codes = levels.size();
        book = {block_size, codes, levels.data(), midpoints.data(), codes / 2 - 1, half_range, table.data()};
    }
    Book(const Book &) = delete;
};

// Blocks (n, B): ordinary, rounded, with an outlier, constant, far from zero, denormal.
std::vector<float> random_blocks(std::size_t n, std::size_t size) {
    std::normal_distribution<float> normal;
    std::vector<float> blocks(n * size);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        const float x = normal(random_engine);
        const std::size_t kind = i / size % 8;
        blocks[i] = kind == 0   ? std::round(4.0f * x) / 8.0f
                    : kind == 1 ? (i % size == 5 ? 3e30f : x)
                    : kind == 2 ? 0.3f
                    : kind == 3 ? 1000.0f + std::round(x) / 16384.0f
                    : kind == 4 ? std::round(0.6f * x) * std::ldexp(1.0f, -149)
                    : kind == 5 ? std::round(8.0f * x) * std::ldexp(1.0f, -149)
                                : 0.02f * x;
    }
    return blocks;
}

// Steps 1 to 6 of one block, every candidate in full.
std::pair<float, float> naive(const irq::IcqBook &book, const irq::IcqSearch &search, const float *block) {
    const std::size_t size = book.block_size;
    std::vector<float> sorted(block, block + size);
    std::sort(sorted.begin(), sorted.end());
    const float low = sorted[0], high = sorted[size - 1], median = sorted[size / 2 - 1];
    const float reach = std::max(high - median, median - low);
    std::pair<float, float> best{};
    std::int64_t most = -1;
    float least = 0;
    for (std::size_t i = 0; i < search.candidates; ++i) {
        float tau = search.factors[i] * reach + median;
        float scale = std::max(high - tau, tau - low);
        if (book.half_range != 0) {
            scale /= book.half_range;
            tau += scale / 2;
        }
        std::vector<std::size_t> counts(book.codes);
        std::vector<float> error(size);
        for (std::size_t j = 0; j < size; ++j) {
            std::size_t code = 0;
            for (std::size_t k = 0; k + 1 < book.codes; ++k) code += block[j] > scale * book.midpoints[k] + tau;
            if (scale == 0) code = book.zero_code;
            ++counts[code];
            const float difference = block[j] - (book.levels[code] * scale + tau);
            error[j] = difference * difference;
        }
        std::int64_t entropy = 0;
        for (const std::size_t count : counts) entropy += book.table[count];
        for (std::size_t half = size / 2; half > 0; half /= 2) {
            for (std::size_t j = 0; j < half; ++j) error[j] += error[j + half];
        }
        if (!search.by_entropy) entropy = 0;
        const bool less = !(search.by_entropy && search.tie_first) && error[0] < least;
        const bool better = entropy > most || (entropy == most && less);
        if (i > 0 && (!better || reach == 0)) continue;
        best = {scale, tau};
        most = entropy;
        least = error[0];
    }
    return best;
}

struct Result {
    std::vector<float> scale, tau;
    std::vector<std::uint8_t> packed;
    irq::IcqMeasure measure;
    std::int64_t plain_entropy;
};

Result run(const irq::IcqBook &book, const irq::IcqSearch &search, const std::vector<float> &blocks) {
    const std::size_t n = blocks.size() / book.block_size;
    const std::size_t bits = book.codes == 16 ? 4 : book.codes == 8 ? 3 : 2;
    Result r{std::vector<float>(n), std::vector<float>(n), std::vector<std::uint8_t>(blocks.size() * bits / 8), {}, 0};
    irq::icq_search(book, search, blocks.data(), n, r.scale.data(), r.tau.data());
    r.measure = irq::icq_encode(book, blocks.data(), r.scale.data(), r.tau.data(), n, r.packed.data());
    r.plain_entropy = irq::icq_plain_entropy(book, blocks.data(), n);
    return r;
}

// Of the ranges the last two make thresholds fall by rounding, and coincide.
void check(const irq::IcqBook &book, std::size_t n, std::size_t candidates, float range) {
    const std::vector<float> blocks = random_blocks(n, book.block_size);
    std::vector<float> factors(candidates);
    for (std::size_t i = 0; i < candidates; ++i) {
        factors[i] = range * (static_cast<float>(i) / static_cast<float>(candidates) - 0.5f);
    }
    for (int kind = 0; kind < 4; ++kind) {
        const bool plain = kind == 3;
        irq::IcqSearch search{factors.data(), plain ? 0 : candidates, kind != 2, kind == 1, false, true};
        std::vector<float> scale(n), tau(n);
        for (std::size_t b = 0; b < n && !plain; ++b) {
            std::tie(scale[b], tau[b]) = naive(book, search, blocks.data() + b * book.block_size);
        }
        std::vector<Result> baseline;
        for (const irq::Isa isa : irq::all_isas) {
            if (!irq::set_active_isa(isa)) continue;
            const std::string what = "book of " + std::to_string(book.codes) + ", search " + std::to_string(kind);
            for (const bool refit : {false, true}) {
                search.refit = refit;
                const Result found = run(book, search, blocks);
                if (!refit && !plain) expect(found.scale == scale && found.tau == tau, what);
                if (isa == irq::Isa::scalar) baseline.push_back(found);
                const Result &first = baseline[refit];
                expect(found.scale == first.scale && found.tau == first.tau, what + ", pairs");
                expect(found.packed == first.packed, what + ", codes");
                expect(found.measure.entropy == first.measure.entropy && found.plain_entropy == first.plain_entropy,
                       what + ", entropies");
                expect(found.measure.error == first.measure.error && found.measure.norm == first.measure.norm,
                       what + ", sums");
            }
        }
    }
}

}  // namespace

int main() {
    const std::vector<float> nf2{-1.0f, -0.25f, 0.25f, 1.0f}, int3{-4, -3, -2, -1, 0, 1, 2, 3};
    const std::vector<float> nf4(irq_nf4_levels, irq_nf4_levels + 16);
    std::vector<float> int4;
    for (int q = -8; q < 8; ++q) int4.push_back(static_cast<float>(q));
    for (const std::size_t size : {std::size_t{64}, std::size_t{32}}) {
        const Book books[] = {{nf4, size, 0.0f}, {nf2, size, 0.0f}, {int3, size, 3.5f}, {int4, size, 7.5f}};
        for (const Book &book : books) {
            for (const std::size_t n : {1, 16, 45}) {
                for (const std::size_t candidates : {1, 16, 201}) check(book.book, n, candidates, 0.1f);
            }
            for (const float range : {2.0f, 1e-6f}) check(book.book, 45, 201, range);
        }
        check(books[0].book, 10, irq::icq_max_candidates, 0.1f);
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
