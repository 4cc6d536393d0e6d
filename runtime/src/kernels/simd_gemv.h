// Kernels written once over a set of vector operations S (avx2_ops.h, avx512_ops.h, neon_ops.h): inputs,
// decoding, matrix times vector. S is a type of internal linkage, so every instantiation is too.
//
// A row is  sum_b scale_b * (sum_i level[q_i] x_i) + tau_b * (sum_i x_i):  one multiplication by scale per
// block, and tau never meets a weight.
#pragma once

#include "simd_scales.h"

namespace irq {
namespace {

constexpr std::size_t together = 4;  // rows that share expanded scales and whose lanes are summed at once

template <class S>
void prepare_token(const float *x, std::size_t columns, std::size_t stride, bool, const TokenInput &out) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width, N = group_size / W;
    std::memcpy(out.x, x, columns * sizeof(float));
    for (std::size_t i = columns; i < stride; ++i) out.x[i] = 0.0f;
    for (std::size_t s = 0; s < stride / span_size; ++s) {
        const float *span = out.x + s * span_size;
        Vec largest = S::zero();
        for (std::size_t g = 0; g < 2; ++g) {
            Vec total = S::zero();
            for (std::size_t i = 0; i < N; ++i) {
                const Vec v = S::load(span + g * group_size + i * W);
                total = S::add(total, v);
                largest = S::max(largest, S::abs(v));
            }
            out.sum[2 * s + g] = S::sum(total);
        }
        out.span_sum[s] = out.sum[2 * s] + out.sum[2 * s + 1];
        if (out.codes == nullptr) continue;
        if (!std::isfinite(out.span_sum[s])) {
            mark_not_finite(out, s);
            continue;
        }
        const float top = S::max_of(largest);
        const Vec rate = S::set1(code_rate(top, largest_input_code));
        for (std::size_t i = 0; i < span_size; i += W) {
            S::store_int16(out.codes + s * span_size + i, S::mul(S::load(span + i), rate));
        }
        out.scale[s] = top / largest_input_code;
    }
}

template <class S, class L>
void decode_row(const Matrix &w, const std::uint8_t *codes, std::size_t blocks, const float *scale,
                const float *tau, float *weight) {
    using Vec = typename S::Vec;
    constexpr std::size_t N = L::block / S::width;
    const auto levels = S::template levels<L>(levels_of(w));
    for (std::size_t b = 0; b < blocks; ++b, codes += L::stride) {
        prefetch(codes, codes_ahead, L::stride);
        Vec level[N];
        S::template decode<L>(codes, levels, level);
        for (std::size_t i = 0; i < N; ++i, weight += S::width) {
            Vec value = S::mul(level[i], S::set1(scale[b]));
            if constexpr (L::adds_tau) value = S::add(value, S::set1(tau[b]));
            S::store(weight, value);
        }
    }
}

// Columns [b0 * block, ...) of `blocks` blocks of one row.
template <class S, class L>
void decode_blocks(const Matrix &w, std::size_t row, std::size_t b0, std::size_t blocks, float *weight) {
    alignas(64) float scale[max_blocks + slack], tau[max_blocks + slack];
    for (std::size_t b = 0; b < blocks; b += max_blocks) {
        const std::size_t n = smaller(max_blocks, blocks - b), k = row * w.blocks_per_row() + b0 + b;
        expand<S, L>(w, k, n, scale, tau);
        const std::uint8_t *codes = static_cast<const std::uint8_t *>(w.data) + k * L::stride + L::lead;
        decode_row<S, L>(w, codes, n, scale, tau, weight + b * L::block);
    }
}

template <class S>
typename S::Vec load_float(Format format, const std::uint8_t *row, std::size_t i) {
    switch (format) {
        case Format::f32: return S::load(reinterpret_cast<const float *>(row) + i);
        case Format::f16: return S::load_f16(row + 2 * i);
        default: return S::load_bf16(row + 2 * i);
    }
}

// Columns [c0, c0 + n) of one row of a float format.
template <class S>
void decode_floats(const Matrix &w, std::size_t row, std::size_t c0, std::size_t n, float *weight) {
    const std::uint8_t *data = row_data(w, row);
    std::size_t i = 0;
    for (; i + S::width <= n; i += S::width) S::store(weight + i, load_float<S>(w.format, data, c0 + i));
    for (; i < n; ++i) weight[i] = float_at(w.format, data, c0 + i);
}

template <class S>
void decode_rows(const Matrix &w, std::size_t r0, std::size_t r1, float *weight) {
    if (is_float(w.format)) {
        for (std::size_t r = r0; r < r1; ++r, weight += w.columns) decode_floats<S>(w, r, 0, w.columns, weight);
        return;
    }
    with_layout(w, [&](auto layout) {
        for (std::size_t r = r0; r < r1; ++r, weight += w.columns) {
            decode_blocks<S, decltype(layout)>(w, r, 0, w.blocks_per_row(), weight);
        }
    });
}

// The same n blocks of some rows.
template <std::size_t R>
struct Rows {
    const std::uint8_t *codes[R];
    const float *scale[R], *tau[R];
};

// What rows are multiplied by: n blocks of x from column `column` on. Called with those of `rows_at_once` rows, it adds
// their products to total, whose lanes are summed at the end. `ahead`: bytes from codes to those to ask memory for; the
// rows are taken for one stretch. In float32:
template <class S, class L>
class ExactDot {
  public:
    using Vec = typename S::Vec;
    static constexpr std::size_t rows_at_once = 4, bytes_ahead = codes_ahead;

    ExactDot(const Matrix &w, const TokenInput &x, std::size_t column, std::size_t n, std::size_t ahead)
        : n_(n), ahead_(ahead), in_(x.x + column), sum_(block_sums<L>(x) + column / L::block),
          levels_(S::template levels<L>(levels_of(w))) {}

    void operator()(const Rows<rows_at_once> &rows, Vec total[rows_at_once]) const {
        constexpr std::size_t N = L::block / S::width, R = rows_at_once;
        Vec sums[R];
        for (std::size_t r = 0; r < R; ++r) sums[r] = total[r];
        for (std::size_t b = 0; L::adds_tau && b < n_; b += S::width) {
            for (std::size_t r = 0; r < R; ++r) {
                sums[r] = S::add_product(S::load(rows.tau[r] + b), sum_ + b, n_ - b, sums[r]);
            }
        }
#pragma GCC unroll 2
        for (std::size_t b = 0; b < n_; ++b) {
            prefetch(rows.codes[0] + R * b * L::stride, ahead_, R * L::stride);
            Vec in[N];
            for (std::size_t i = 0; i < N; ++i) in[i] = S::load(in_ + b * L::block + i * S::width);
            for (std::size_t r = 0; r < R; ++r) {
                Vec level[N];
                S::template decode<L>(rows.codes[r] + b * L::stride, levels_, level);
                Vec part = S::mul(level[0], in[0]);
                for (std::size_t i = 1; i < N; ++i) part = S::fma(level[i], in[i], part);
                sums[r] = S::fma(part, S::set1(rows.scale[r][b]), sums[r]);
            }
        }
        for (std::size_t r = 0; r < R; ++r) total[r] = sums[r];
    }

  private:
    std::size_t n_, ahead_;
    const float *in_, *sum_;
    typename S::Levels levels_;
};

// With 16-bit codes of both.
template <class S, class L>
class WordDot {
  public:
    using Vec = typename S::Vec;
    static constexpr std::size_t rows_at_once = 2, bytes_ahead = codes_ahead;

    WordDot(const Matrix &w, const TokenInput &x, std::size_t column, std::size_t n, std::size_t ahead)
        : n_(n), ahead_(ahead), in_(x.codes + column), in_scale_(x.scale + column / span_size),
          sum_(block_sums<L>(x) + column / L::block), table_(S::template codes<L>(code_table_of(w))),
          step_(code_table_of(w).step) {}

    void operator()(const Rows<rows_at_once> &rows, Vec total[rows_at_once]) const {
        using Words = typename S::Words;
        constexpr std::size_t N = L::block / (2 * S::width), R = rows_at_once;
        Vec sums[R];
        for (std::size_t r = 0; r < R; ++r) sums[r] = total[r];
        for (std::size_t b = 0; L::adds_tau && b < n_; b += S::width) {
            for (std::size_t r = 0; r < R; ++r) {
                sums[r] = S::add_product(S::load(rows.tau[r] + b), sum_ + b, n_ - b, sums[r]);
            }
        }
        for (std::size_t b = 0; b < n_; ++b) {
            prefetch(rows.codes[0] + R * b * L::stride, ahead_, R * L::stride);
            const auto in_scale = S::set1(step_ * in_scale_[b * L::block / span_size]);
            Words in[N];
            for (std::size_t i = 0; i < N; ++i) in[i] = S::load_words(in_ + b * L::block + 2 * i * S::width);
            for (std::size_t r = 0; r < R; ++r) {
                Words weight[N];
                S::template unpack<L>(rows.codes[r] + b * L::stride, table_, weight);
                auto products = S::no_products();
                for (std::size_t i = 0; i < N; ++i) products = S::add_products(products, weight[i], in[i]);
                const auto part = S::mul(S::to_float(products), in_scale);
                sums[r] = S::fma(part, S::set1(rows.scale[r][b]), sums[r]);
            }
        }
        for (std::size_t r = 0; r < R; ++r) total[r] = sums[r];
    }

  private:
    std::size_t n_, ahead_;
    const std::int16_t *in_;
    const float *in_scale_, *sum_;
    typename S::Codes table_;
    float step_;
};

template <class S, class L, class Dot>
void gemv_blocks(const Matrix &w, const TokenInput &x, std::size_t r0, std::size_t r1, float *y, Store store) {
    using Vec = typename S::Vec;
    constexpr std::size_t R = Dot::rows_at_once;
    const std::size_t nb = w.blocks_per_row();
    const std::uint8_t *codes = static_cast<const std::uint8_t *>(w.data) + L::lead;
    const std::size_t ahead = larger(Dot::bytes_ahead, R * nb * L::stride);
    const bool narrow = nb <= max_blocks;
    const Dot whole(w, x, 0, narrow ? nb : 0, ahead);
    ScaleWindow<S, L> window(w, narrow ? together * nb : max_blocks);
    // Rows whose first blocks are k0, k0 + step, ..., as far as `last`.
    const auto add_rows = [&](const Dot &dot, std::size_t k0, std::size_t step, std::size_t last, Vec *total) {
        Rows<R> rows;
        for (std::size_t i = 0, k = k0; i < R; ++i, k = smaller(k + step, last)) {
            rows.codes[i] = codes + k * L::stride;
            rows.scale[i] = window.scale(k);
            rows.tau[i] = window.tau(k);
        }
        dot(rows, total);
    };
    window.prefetch_from(r0 * nb);
    prefetch(codes + r0 * nb * L::stride, 0, smaller(ahead, (r1 - r0) * nb * L::stride));
    for (std::size_t row = r0; row < r1; row += together) {
        const std::size_t rows = smaller(together, r1 - row);
        Vec total[together] = {S::zero(), S::zero(), S::zero(), S::zero()};
        if (narrow) window.reach(row * nb, rows * nb);
#pragma GCC unroll 2
        for (std::size_t r = 0; r < together; r += R) {
            if (r >= rows) break;
            if (narrow) {
                add_rows(whole, (row + r) * nb, nb, (row + rows - 1) * nb, total + r);
                continue;
            }
            for (std::size_t i = r; i < smaller(r + R, rows); ++i) {  // hardly a model is so wide: one row, R times
                Vec same[R];
                for (Vec &sum : same) sum = S::zero();
                for (std::size_t b = 0; b < nb; b += max_blocks) {
                    const std::size_t n = smaller(max_blocks, nb - b), k = (row + i) * nb + b;
                    window.reach(k, n);
                    add_rows(Dot(w, x, b * L::block, n, ahead), k, 0, k, same);
                }
                total[i] = same[0];
            }
        }
        if (rows == together && store == Store::set) {
            S::sums(total, y + row);
            continue;
        }
        float sums[together];
        S::sums(total, sums);
        for (std::size_t r = 0; r < rows; ++r) store_to(y + row + r, sums[r], store);
    }
}

template <class S, Format format>
float dot_floats(std::size_t n, const float *x, const std::uint8_t *row) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width, element = format == Format::f32 ? 4 : 2;
    const auto load = [row](std::size_t i) { return load_float<S>(format, row, i); };
    Vec total[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    std::size_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        prefetch(row + i * element, codes_ahead, 4 * W * element);
        for (std::size_t j = 0; j < 4; ++j) total[j] = S::fma(load(i + j * W), S::load(x + i + j * W), total[j]);
    }
    for (; i + W <= n; i += W) total[0] = S::fma(load(i), S::load(x + i), total[0]);
    float sum = S::sum(S::add(S::add(total[0], total[1]), S::add(total[2], total[3])));
    for (; i < n; ++i) sum += float_at(format, row, i) * x[i];
    return sum;
}

template <class S, Format format>
void gemv_floats(const Matrix &w, const float *x, std::size_t r0, std::size_t r1, float *y, Store store) {
    for (std::size_t r = r0; r < r1; ++r) {
        store_to(y + r, dot_floats<S, format>(w.columns, x, row_data(w, r)), store);
    }
}

// FastDot: of fast mode.
template <class S, template <class, class> class FastDot = WordDot>
void gemv_rows(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
               Store store) {
    const TokenInput in = x.token(token);
    switch (w.format) {
        case Format::f32: return gemv_floats<S, Format::f32>(w, in.x, r0, r1, y, store);
        case Format::f16: return gemv_floats<S, Format::f16>(w, in.x, r0, r1, y, store);
        case Format::bf16: return gemv_floats<S, Format::bf16>(w, in.x, r0, r1, y, store);
        default: break;
    }
    with_layout(w, [&](auto layout) {
        using L = decltype(layout);
        if (x.mode() == Mode::exact) gemv_blocks<S, L, ExactDot<S, L>>(w, in, r0, r1, y, store);
        else gemv_blocks<S, L, FastDot<S, L>>(w, in, r0, r1, y, store);
    });
}

}  // namespace
}  // namespace irq
