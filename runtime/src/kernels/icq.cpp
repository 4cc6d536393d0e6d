// ICQ search on a CPU: sort a block once, then walk its decision thresholds through the candidates.
//
// From one candidate to the next a threshold moves by a fraction of the block's range, so the number of
// weights below it changes rarely and by little: a pointer per threshold follows it in a couple of compares,
// and the entropy is summed again only if a pointer moved. That makes a candidate cost some 60 scalar
// operations, less than counting 64 weights against 15 thresholds with AVX-512 (60 compares on one port).
#include "irq/icq.h"

#include <algorithm>
#include <array>
#include <limits>

namespace irq {
namespace {

constexpr std::size_t kMaxBlock = 64;
constexpr std::size_t kMaxThresholds = 15;

struct Pair {
    float scale, tau;
};

// A sorted block between sentinels: value(i) is the i-th smallest, i = 1..B.
struct Sorted {
    std::array<float, kMaxBlock + 2> values;
    std::size_t size;

    Sorted(const float *block, std::size_t block_size) : size(block_size) {
        std::copy_n(block, size, values.begin() + 1);
        std::sort(values.begin() + 1, values.begin() + 1 + static_cast<std::ptrdiff_t>(size));
        values[0] = -std::numeric_limits<float>::infinity();
        values[size + 1] = std::numeric_limits<float>::infinity();
    }
    float low() const { return values[1]; }
    float high() const { return values[size]; }
    float lower_median() const { return values[size / 2]; }
};

// Step 3: the pair of a candidate offset.
Pair pair_at(const Sorted &sorted, float t, float half_range) {
    const float s = std::max(sorted.high() - t, t - sorted.low());
    if (half_range == 0.0f) return {s, t};
    const float d = s / half_range;
    return {d, t + d / 2.0f};
}

// Counts of weights not above each threshold, kept from candidate to candidate.
class Counter {
public:
    Counter(const IcqSearch &search, const Sorted &sorted) : search_(search), sorted_(sorted) {}

    // Step 5: entropy of the codes at a pair.
    std::int64_t entropy(Pair pair) {
        if (pair.scale == 0.0f) return 0;
        const float *values = sorted_.values.data();
        const std::size_t thresholds = static_cast<std::size_t>(search_.codes) - 1;
        bool moved = first_;
        first_ = false;
        for (std::size_t k = 0; k < thresholds; ++k) {
            const float scaled = pair.scale * search_.midpoints[k];
            const float threshold = scaled + pair.tau;
            std::size_t count = counts_[k];
            while (values[count + 1] <= threshold) ++count;
            while (values[count] > threshold) --count;
            moved |= count != counts_[k];
            counts_[k] = count;
        }
        if (moved) sum(thresholds);
        return entropy_;
    }

private:
    void sum(std::size_t thresholds) {
        std::size_t below = 0;
        entropy_ = 0;
        for (std::size_t k = 0; k < thresholds; ++k) {
            entropy_ += search_.table[counts_[k] - below];
            below = counts_[k];
        }
        entropy_ += search_.table[sorted_.size - below];
    }

    const IcqSearch &search_;
    const Sorted &sorted_;
    std::array<std::size_t, kMaxThresholds> counts_{};
    std::int64_t entropy_ = 0;
    bool first_ = true;
};

// Step 5: squared error of the codes at a pair, summed by halving.
float squared_error(const IcqSearch &search, const float *block, Pair pair) {
    const std::size_t size = search.block_size;
    std::array<int, kMaxBlock> codes{};
    if (pair.scale == 0.0f) {
        codes.fill(search.zero_code);
    } else {
        for (int k = 0; k + 1 < search.codes; ++k) {
            const float scaled = pair.scale * search.midpoints[k];
            const float threshold = scaled + pair.tau;
            for (std::size_t j = 0; j < size; ++j) codes[j] += block[j] > threshold;
        }
    }
    std::array<float, kMaxBlock> error;
    for (std::size_t j = 0; j < size; ++j) {
        const float scaled = search.levels[codes[j]] * pair.scale;
        const float difference = block[j] - (scaled + pair.tau);
        error[j] = difference * difference;
    }
    for (std::size_t half = size / 2; half > 0; half /= 2) {
        for (std::size_t j = 0; j < half; ++j) error[j] += error[j + half];
    }
    return error[0];
}

Pair search_block(const IcqSearch &search, const float *block, std::int64_t *entropies) {
    const Sorted sorted(block, search.block_size);
    const float median = sorted.lower_median();
    const float reach = std::max(sorted.high() - median, median - sorted.low());
    const auto candidate = [&](std::size_t i) {
        const float shift = search.factors[i] * reach;
        return pair_at(sorted, shift + median, search.half_range);
    };
    if (reach == 0.0f) return candidate(0);  // constant: the candidates are all the same

    std::int64_t most = std::numeric_limits<std::int64_t>::min();
    if (search.by_entropy) {
        Counter counter(search, sorted);
        std::size_t first = 0;
        for (std::size_t i = 0; i < search.candidates; ++i) {
            entropies[i] = counter.entropy(candidate(i));
            if (entropies[i] > most) {
                most = entropies[i];
                first = i;
            }
        }
        if (search.tie_first) return candidate(first);
    }
    Pair best{};
    float least = std::numeric_limits<float>::infinity();
    bool found = false;
    for (std::size_t i = 0; i < search.candidates; ++i) {
        if (search.by_entropy && entropies[i] != most) continue;
        const Pair pair = candidate(i);
        const float error = squared_error(search, block, pair);
        if (!found || error < least) {
            best = pair;
            least = error;
            found = true;
        }
    }
    return best;
}

}  // namespace

void icq_search(const IcqSearch &search, const float *blocks, std::size_t n, float *scale, float *tau) {
    constexpr std::size_t kMaxCandidates = 4096;
    std::array<std::int64_t, kMaxCandidates> entropies;
    for (std::size_t b = 0; b < n; ++b) {
        const Pair pair = search_block(search, blocks + b * search.block_size, entropies.data());
        scale[b] = pair.scale;
        tau[b] = pair.tau;
    }
}

}  // namespace irq
