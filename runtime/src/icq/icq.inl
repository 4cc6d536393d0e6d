// Included by icq*.cpp, each compiled for one instruction set: plain loops over whole blocks, which the compiler
// makes vectors of. No function of the standard library that could be compiled twice is called.
//
// A candidate is a scale and an offset. From the first candidate to the last every threshold rises past a few of
// the sorted weights, so that the codes change at some 60 of 201 candidates only. Instead of counting weights at
// every candidate, all thresholds of a midpoint are computed at once, and for each weight that they pass, the
// candidate at which they do is found. A walk through these crossings in order gives the entropy of each run of
// candidates that share all codes. That thresholds rise, which rounding can break, is checked; where one falls,
// every candidate is counted by itself.
#include <limits>

#include "icq_codes.inl"
#include "icq_kernels.h"
#include "icq_sort.inl"

namespace irq {
namespace {

constexpr std::size_t most_candidates = icq_max_candidates, most_thresholds = 15;

// Candidates first..end-1, which share the code of every weight.
struct Run {
    std::size_t first, end;
};

template <std::size_t B>
class Search {
  public:
    Search(const IcqBook &book, const IcqSearch &search)
        : book_(book), search_(search), count_(search.candidates), padded_((count_ + stride - 1) / stride * stride) {
        for (std::size_t n = 0; n <= B; ++n) table_[B + n] = book.table[n];
        for (std::size_t i = 0; i < padded_; ++i) factors_[i] = search.factors[i < count_ ? i : count_ - 1];
        for (float &threshold : coarse_) threshold = std::numeric_limits<float>::infinity();
        threshold_[padded_] = std::numeric_limits<float>::infinity();
    }

    // Steps 1 to 6 for a block and the same weights in ascending order.
    Pair best(const float *block, const float *sorted) {
        sorted_ = sorted;
        const float low = sorted[0], high = sorted[B - 1], median = sorted[B / 2 - 1];
        const float up = high - median, down = median - low, reach = up < down ? down : up;
        place(low, high, median, reach);
        if (reach == 0.0f) return candidate(0);  // constant: the candidates are all the same
        runs_ = 0;
        most_ = std::numeric_limits<std::int64_t>::min();
        if (find_crossings()) {
            walk();
        } else {
            for (std::size_t i = 0; i < count_; ++i) keep({i, i + 1}, entropy_of<B>(book_, sorted, candidate(i)));
        }
        return search_.by_entropy && search_.tie_first ? candidate(kept_[0].first) : least_error(block);
    }

  private:
    Pair candidate(std::size_t i) const { return {scale_[i], tau_[i]}; }

    // Steps 2 and 3: the pair of every candidate.
    void place(float low, float high, float median, float reach) {
        for (std::size_t i = 0; i < padded_; ++i) {
            const float t = factors_[i] * reach + median, up = high - t, down = t - low;
            tau_[i] = t;
            scale_[i] = up < down ? down : up;
        }
        if (book_.half_range == 0.0f) return;
        for (std::size_t i = 0; i < padded_; ++i) {
            const float d = scale_[i] / book_.half_range;
            scale_[i] = d;
            tau_[i] += d / 2.0f;
        }
    }

    // Finds where every threshold passes a weight. False if one falls, or a scale is zero.
    bool find_crossings() {
        std::int32_t zeros = 0;
        for (std::size_t i = 0; i < padded_; ++i) zeros |= scale_[i] == 0.0f ? 1 : 0;
        if (zeros != 0) return false;
        for (std::size_t i = 0; i < padded_; ++i) last_[i] = none;
        for (std::size_t word = 0; word <= count_ / 64; ++word) busy_[word] = 0;
        crossings_ = 0;
        for (std::size_t k = 0; k + 1 < book_.codes; ++k) {
            if (!find_crossings(k)) return false;
        }
        return true;
    }

    bool find_crossings(std::size_t k) {
        const float midpoint = book_.midpoints[k];
        const std::size_t padded = padded_;
        for (std::size_t i = 0; i < padded; i += lanes) {
            save(load(scale_ + i) * midpoint + load(tau_ + i), threshold_ + i);
        }
        Tally falls;
        for (std::size_t i = 0; i < padded; i += lanes) {
            falls.add_below(load(threshold_ + i + 1), load(threshold_ + i));
        }
        if (falls.count() != 0) return false;
        for (std::size_t i = 0; i < padded_ / stride; ++i) coarse_[i] = threshold_[stride * i + stride - 1];
        not_above_[k] = B - above(threshold_[0]);
        for (std::size_t j = not_above_[k], end = B - above(threshold_[padded_ - 1]); j < end; ++j) {
            const std::size_t i = first_not_below(all(sorted_[j]));
            busy_[i / 64] |= std::uint64_t{1} << i % 64;
            next_[crossings_] = last_[i];
            passed_[crossings_] = static_cast<std::uint16_t>(k);
            last_[i] = static_cast<std::uint16_t>(crossings_++);
        }
        return true;
    }

    // Weights above a threshold.
    std::size_t above(float threshold) const {
        Tally tally;
        for (std::size_t j = 0; j < B; j += lanes) tally.add_below(all(threshold), load(sorted_ + j));
        return tally.count();
    }

    // The first candidate whose threshold is not below a weight; the last one's is not.
    std::size_t first_not_below(Vector weight) const {
        std::size_t strides = 0;
        for (std::size_t i = 0; i < padded_ / stride; i += stride) strides += count_below(coarse_ + i, weight);
        return stride * strides + count_below(threshold_ + stride * strides, weight);
    }

    // Of `stride` values, those below a weight.
    static std::size_t count_below(const float *values, Vector weight) {
        Tally tally;
        for (std::size_t i = 0; i < stride; i += lanes) tally.add_below(load(values + i), weight);
        return tally.count();
    }

    // Follows the counts of the codes, and so the entropy, from crossing to crossing.
    void walk() {
        std::size_t counts[most_thresholds + 1];  // plus B: one may be negative between crossings of a candidate
        std::int64_t entropy = 0;
        for (std::size_t q = 0; q < book_.codes; ++q) {
            counts[q] = B + (q + 1 < book_.codes ? not_above_[q] : B) - (q > 0 ? not_above_[q - 1] : 0);
            entropy += table_[counts[q]];
        }
        std::size_t first = 0;
        for (std::size_t word = 0; word <= count_ / 64; ++word) {
            for (std::uint64_t left = busy_[word]; left != 0; left &= left - 1) {
                const std::size_t i = 64 * word + static_cast<std::size_t>(__builtin_ctzll(left));
                keep({first, i}, entropy);
                for (std::uint16_t c = last_[i]; c != none; c = next_[c]) {
                    const std::size_t q = passed_[c];
                    entropy -= table_[counts[q]] + table_[counts[q + 1]];
                    entropy += table_[++counts[q]] + table_[--counts[q + 1]];
                }
                first = i;
            }
        }
        keep({first, count_}, entropy);
    }

    // Keeps the runs of most entropy (or all), in order.
    void keep(Run run, std::int64_t entropy) {
        if (search_.by_entropy && entropy != most_) {
            if (entropy < most_) return;
            most_ = entropy;
            runs_ = 0;
        }
        kept_[runs_++] = run;
    }

    // Of the kept candidates the one of least squared error, the first of equals.
    Pair least_error(const float *block) const {
        Pair best = candidate(kept_[0].first);
        float least = std::numeric_limits<float>::infinity(), levels[B];
        for (std::size_t r = 0; r < runs_; ++r) {
            levels_of<B>(book_, block, candidate(kept_[r].first), levels);
            for (std::size_t i = kept_[r].first; i < kept_[r].end; ++i) {
                const float error = squared_error<B>(block, levels, candidate(i));
                if (error < least) {
                    least = error;
                    best = candidate(i);
                }
            }
        }
        return best;
    }

    static constexpr std::uint16_t none = 0xffff;
    static constexpr std::size_t stride = 16;

    const IcqBook &book_;
    const IcqSearch &search_;
    const std::size_t count_, padded_;  // candidates; with the last one repeated, whole strides
    const float *sorted_ = nullptr;
    std::int64_t table_[3 * B + 1] = {};  // entropy of a count, from -B to 2 B

    alignas(64) float factors_[most_candidates], scale_[most_candidates], tau_[most_candidates];
    // Of one midpoint: the threshold of every candidate, of the last in every stride.
    alignas(64) float threshold_[most_candidates + 1], coarse_[most_candidates / stride];

    std::size_t not_above_[most_thresholds];  // weights, at the first candidate

    // A crossing: at a candidate, a threshold (`passed_`) passes a weight. Those of a candidate are a list.
    std::size_t crossings_ = 0;
    std::uint16_t passed_[most_thresholds * B], next_[most_thresholds * B], last_[most_candidates];
    std::uint64_t busy_[most_candidates / 64 + 1];  // candidates that have a list

    std::size_t runs_ = 0;
    Run kept_[most_candidates];
    std::int64_t most_ = 0;
};

template <std::size_t B>
void search_blocks(const IcqBook &book, const IcqSearch &how, const float *blocks, std::size_t n, float *scale,
                   float *tau) {
    Search<B> search(book, how);
    Group<B> group;
    for (std::size_t b = 0; b < n; ++b) {
        const float *block = blocks + b * B;
        const std::size_t lane = b % lanes;
        if (how.candidates > 0 && lane == 0) sort<B>(block, n - b < lanes ? n - b : lanes, group);
        Pair pair = how.candidates > 0 ? search.best(block, group.sorted[lane])
                                       : plain_start<B>(book, block, how.with_tau);
        if (how.refit) pair = refitted<B>(book, block, pair, how.with_tau);
        scale[b] = pair.scale;
        tau[b] = pair.tau;
    }
}

template <std::size_t B>
std::int64_t plain_entropy_of(const IcqBook &book, const float *blocks, std::size_t n) {
    std::int64_t entropy = 0;
    for (const float *block = blocks; block != blocks + n * B; block += B) {
        entropy += entropy_of<B>(book, block, plain_pair<B>(book, block));
    }
    return entropy;
}

constexpr IcqKernels kernels{
    [](const IcqBook &book, const IcqSearch &how, const float *blocks, std::size_t n, float *scale, float *tau) {
        (book.block_size == 64 ? search_blocks<64> : search_blocks<32>)(book, how, blocks, n, scale, tau);
    },
    [](const IcqBook &book, const float *blocks, std::size_t n) {
        return (book.block_size == 64 ? plain_entropy_of<64> : plain_entropy_of<32>)(book, blocks, n);
    },
    [](const IcqBook &book, const float *blocks, const float *scale, const float *tau, std::size_t n,
       std::uint8_t *packed) {
        return (book.block_size == 64 ? encode_blocks<64> : encode_blocks<32>)(book, blocks, scale, tau, n, packed);
    },
};

}  // namespace
}  // namespace irq
