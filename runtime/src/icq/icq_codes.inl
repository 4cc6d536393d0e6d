// Part of icq.inl: what a scale and an offset do to a block, and the fit to what they do.
#include "icq_kernels.h"

namespace irq {
namespace {

struct Pair {
    float scale, tau;
};

// Sum of x (B,) by halving; x is lost.
template <std::size_t B, typename Number>
Number halving_sum(Number *x) {
    if constexpr (B == 1) {
        return x[0];
    } else {
        for (std::size_t j = 0; j < B / 2; ++j) x[j] += x[j + B / 2];
        return halving_sum<B / 2>(x);
    }
}

// Step 4: the level of every weight.
template <std::size_t B>
void levels_of(const IcqBook &book, const float *block, Pair pair, float *levels) {
    const float first = book.levels[pair.scale == 0.0f ? book.zero_code : 0];
    for (std::size_t j = 0; j < B; ++j) levels[j] = first;
    if (pair.scale == 0.0f) return;
    for (std::size_t k = 0; k + 1 < book.codes; ++k) {
        const float threshold = pair.scale * book.midpoints[k] + pair.tau, level = book.levels[k + 1];
        for (std::size_t j = 0; j < B; ++j) levels[j] = block[j] > threshold ? level : levels[j];
    }
}

// Step 5: entropy of the codes of a block in any order.
template <std::size_t B>
std::int64_t entropy_of(const IcqBook &book, const float *block, Pair pair) {
    if (pair.scale == 0.0f) return 0;
    std::int64_t entropy = 0;
    std::int32_t before = 0;
    for (std::size_t k = 0; k + 1 < book.codes; ++k) {
        const float threshold = pair.scale * book.midpoints[k] + pair.tau;
        std::int32_t not_above = 0;
        for (std::size_t j = 0; j < B; ++j) not_above += block[j] <= threshold;
        entropy += book.table[not_above - before];
        before = not_above;
    }
    return entropy + book.table[static_cast<std::int32_t>(B) - before];
}

// Step 5: squared error of the levels at a pair.
template <std::size_t B>
float squared_error(const float *block, const float *levels, Pair pair) {
    float error[B];
    for (std::size_t j = 0; j < B; ++j) {
        const float difference = block[j] - (levels[j] * pair.scale + pair.tau);
        error[j] = difference * difference;
    }
    return halving_sum<B>(error);
}

// Step 7.
template <std::size_t B>
Pair refitted(const IcqBook &book, const float *block, Pair pair, bool with_tau) {
    float levels[B];
    levels_of<B>(book, block, pair, levels);
    double sum[B], c[B], w[B], mean_c = 0.0, mean_w = 0.0;
    if (with_tau) {
        for (std::size_t j = 0; j < B; ++j) sum[j] = levels[j];
        mean_c = halving_sum<B>(sum) / static_cast<double>(B);
        for (std::size_t j = 0; j < B; ++j) sum[j] = block[j];
        mean_w = halving_sum<B>(sum) / static_cast<double>(B);
    }
    for (std::size_t j = 0; j < B; ++j) c[j] = static_cast<double>(levels[j]) - mean_c;
    for (std::size_t j = 0; j < B; ++j) w[j] = static_cast<double>(block[j]) - mean_w;
    for (std::size_t j = 0; j < B; ++j) sum[j] = c[j] * c[j];
    const double variance = halving_sum<B>(sum);
    if (!(variance > 0.0)) return pair;
    for (std::size_t j = 0; j < B; ++j) sum[j] = c[j] * w[j];
    const double slope = halving_sum<B>(sum) / variance;
    const float scale = static_cast<float>(slope);
    return scale > 0.0f ? Pair{scale, static_cast<float>(mean_w - slope * mean_c)} : pair;
}

// Step 3 without a search.
template <std::size_t B>
Pair plain_pair(const IcqBook &book, const float *block) {
    float scale = 0.0f;
    for (std::size_t j = 0; j < B; ++j) {
        const float size = block[j] < 0.0f ? -block[j] : block[j];
        scale = size > scale ? size : scale;
    }
    return {book.half_range == 0.0f ? scale : scale / book.half_range, 0.0f};
}

// Without a search; a constant block decodes exactly wherever there is an offset.
template <std::size_t B>
Pair plain_start(const IcqBook &book, const float *block, bool with_tau) {
    bool constant = with_tau;
    for (std::size_t j = 1; j < B; ++j) constant &= block[j] == block[0];
    return constant ? Pair{0.0f, block[0]} : plain_pair<B>(book, block);
}

// Packs the codes of a block (spec/irq-blocks.md, section 3).
template <std::size_t B>
void pack(const std::uint8_t *code, std::size_t codes, std::uint8_t *to) {
    if (codes == 16) {
        for (std::size_t j = 0; j < B / 2; ++j) to[j] = static_cast<std::uint8_t>(code[j] | code[j + B / 2] << 4);
        return;
    }
    for (std::size_t j = 0; j < B / 4; ++j) {
        to[j] = static_cast<std::uint8_t>((code[j] & 3) | (code[j + B / 4] & 3) << 2 | (code[j + B / 2] & 3) << 4 |
                                          (code[j + 3 * B / 4] & 3) << 6);
    }
    if (codes == 4) return;
    for (std::size_t j = 0; j < B / 8; ++j) {
        std::uint32_t high = 0;
        for (std::size_t i = 0; i < 8; ++i) high |= static_cast<std::uint32_t>(code[8 * j + i] >> 2) << i;
        to[B / 4 + j] = static_cast<std::uint8_t>(high);
    }
}

template <std::size_t B>
IcqMeasure encode_blocks(const IcqBook &book, const float *blocks, const float *scale, const float *tau,
                         std::size_t n, std::uint8_t *packed) {
    const std::size_t bytes = B / 8 * (book.codes == 16 ? 4 : book.codes == 8 ? 3 : 2);
    IcqMeasure all{0, 0.0, 0.0};
    for (std::size_t b = 0; b < n; ++b) {
        const float *block = blocks + b * B;
        const Pair pair{scale[b], tau[b]};
        std::int32_t code[B] = {};
        for (std::size_t k = 0; k + 1 < book.codes; ++k) {
            const float threshold = pair.scale * book.midpoints[k] + pair.tau;
            for (std::size_t j = 0; j < B; ++j) code[j] += block[j] > threshold;
        }
        std::uint8_t narrow[B];
        const auto zero_code = static_cast<std::uint8_t>(book.zero_code);
        for (std::size_t j = 0; j < B; ++j) {
            narrow[j] = pair.scale == 0.0f ? zero_code : static_cast<std::uint8_t>(code[j]);
        }
        pack<B>(narrow, book.codes, packed + b * bytes);
        all.entropy += entropy_of<B>(book, block, pair);
        float levels[B];
        levels_of<B>(book, block, pair, levels);
        double error[B], norm[B];
        for (std::size_t j = 0; j < B; ++j) {
            const float decoded = pair.scale * levels[j] + pair.tau;
            const double exact = block[j], difference = exact - static_cast<double>(decoded);
            error[j] = difference * difference;
            norm[j] = exact * exact;
        }
        all.error += halving_sum<B>(error);
        all.norm += halving_sum<B>(norm);
    }
    return all;
}

}  // namespace
}  // namespace irq
