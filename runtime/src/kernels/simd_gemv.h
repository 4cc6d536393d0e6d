// Kernels written once over a set of vector operations S (avx2_ops.h, avx512_ops.h, neon_ops.h): inputs,
// decoding, matrix times vector. S is a type of internal linkage, so every instantiation is too.
//
// A row is  sum_b scale_b * (sum_i level[q_i] x_i) + tau_b * (sum_i x_i):  one multiplication by scale per
// block, and tau never meets a weight. The scales of many rows are expanded at once into a small buffer
// (512 values, L1): 8-bit indices stay 8-bit in memory, which is what a memory-bound product wants.
#pragma once

#include "block_layout.h"

namespace irq {
namespace {

constexpr std::size_t max_blocks = 512;  // whose scales are expanded at a time
constexpr std::size_t slack = 64;        // floats that vector stores may write behind them

constexpr std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

template <class S>
void prepare_token(const float *x, std::size_t columns, std::size_t stride, const TokenInput &out) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width, N = group_size / W;
    std::memcpy(out.x, x, columns * sizeof(float));
    for (std::size_t i = columns; i < stride; ++i) out.x[i] = 0.0f;
    for (std::size_t g = 0; g < stride / group_size; ++g) {
        Vec v[N], total = S::zero(), largest = S::zero();
        for (std::size_t i = 0; i < N; ++i) {
            v[i] = S::load(out.x + g * group_size + i * W);
            total = S::add(total, v[i]);
            largest = S::max(largest, S::abs(v[i]));
        }
        out.sum[g] = S::sum(total);
        if (out.codes == nullptr) continue;
        const float top = S::max_of(largest);
        const Vec inverse = S::set1(top > 0.0f ? 127.0f / top : 0.0f);
        Vec code_total = S::zero();
        for (std::size_t i = 0; i < N; ++i) {
            const Vec rounded = S::round(S::mul(v[i], inverse));
            S::store_int8(out.codes + g * group_size + i * W, rounded);
            code_total = S::add(code_total, rounded);  // whole numbers below 2^24: exact
        }
        const float whole = S::sum(code_total);
        out.scale[g] = top / 127.0f;
        out.code_total[g] = static_cast<std::int32_t>(whole);
        out.code_sum[g] = out.scale[g] * whole;
    }
}

// Hardware prefetchers stop at page borders, which rows meet every few hundred nanoseconds.
constexpr std::size_t codes_ahead = 4096;

// Asks for the cache lines of [address + ahead, ... + bytes); may lie outside of any array.
inline void prefetch(const void *address, std::size_t ahead, std::size_t bytes) {
    const auto start = reinterpret_cast<std::uintptr_t>(address) + ahead;
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void *>(start + i));
}

template <class S>
void expand_values(const BlockValues &v, std::size_t k, std::size_t n, float *out) {
    const auto *bytes = static_cast<const std::uint8_t *>(v.values);
    switch (v.storage) {
        case Storage::none:
            for (std::size_t i = 0; i < n; ++i) out[i] = 0.0f;
            return;
        case Storage::f32: std::memcpy(out, bytes + 4 * k, n * sizeof(float)); return;
        case Storage::f16: return S::expand_f16(bytes + 2 * k, n, out);
        default: break;
    }
    for (const std::size_t end = k + n; k < end;) {  // one group, one absmax at a time
        const std::size_t group = k / IRQ_GROUP_SIZE;
        const std::size_t count = smaller((group + 1) * IRQ_GROUP_SIZE, end) - k;
        S::expand_dq8(bytes + k, count, load_as<float>(v.absmax + group), v.offset, v.round_to_f16, out);
        k += count;
        out += count;
    }
}

inline void prefetch_values(const BlockValues &v, std::size_t k, std::size_t n) {
    constexpr std::size_t sizes[] = {0, 4, 2, 1};
    const std::size_t size = sizes[static_cast<int>(v.storage)];
    prefetch(v.values, k * size, n * size);
}

// Scales and taus of n blocks from block k on, counted over the matrix. May write `slack` floats more.
template <class S, class L>
void expand(const Matrix &w, std::size_t k, std::size_t n, float *scale, float *tau) {
    if constexpr (L::lead != 0) {
        const std::uint8_t *block = static_cast<const std::uint8_t *>(w.data) + k * L::stride;
        for (std::size_t i = 0; i < n; ++i, block += L::stride) {
            scale[i] = S::load_half(block);
            if constexpr (L::adds_tau) tau[i] = S::load_half(block + 2);
        }
    } else {
        expand_values<S>(w.scale, k, n, scale);
        if constexpr (L::adds_tau) expand_values<S>(w.tau, k, n, tau);
        // The next rows' scales: by the time they are wanted the codes of these have gone through.
        prefetch_values(w.scale, k + n, n);
        if constexpr (L::adds_tau) prefetch_values(w.tau, k + n, n);
    }
}

// Calls step(codes, i, u) for every 64 weights of a row, and for a last 32 with a zero block behind them.
// u = i % unroll is a constant after inlining: it names the accumulator, so that a step need not wait for
// the sum of the one before.
constexpr std::size_t unroll = 4;

template <class L, class Step>
void for_each_step(const std::uint8_t *codes, std::size_t blocks, Step &&step) {
    constexpr std::size_t per_step = 64 / L::block, bytes = per_step * L::stride;
    const std::size_t steps = blocks / per_step;
    std::size_t i = 0;
    for (; i + unroll <= steps; i += unroll, codes += unroll * bytes) {
        prefetch(codes, codes_ahead, unroll * bytes);
        for (std::size_t u = 0; u < unroll; ++u) step(codes + u * bytes, i + u, u);
    }
    for (; i < steps; ++i, codes += bytes) step(codes, i, std::size_t{0});
    if (blocks % per_step != 0) {
        std::uint8_t last[2 * L::stride] = {};
        std::memcpy(last, codes, L::stride - L::lead);
        step(last, steps, std::size_t{0});
    }
}

template <class S, class L>
void decode_row(const Matrix &w, const std::uint8_t *codes, std::size_t blocks, const float *scale,
                const float *tau, float *weight) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width;
    const auto levels = S::template levels<L>(levels_of(w));
    for_each_step<L>(codes, blocks, [&](const std::uint8_t *p, std::size_t i, std::size_t) {
        Vec level[64 / W];
        S::template decode<L>(p, levels, level);
        const std::size_t n = smaller(64, blocks * L::block - 64 * i);
        for (std::size_t j = 0; j < n; j += W) {
            const std::size_t b = (64 * i + j) / L::block;
            Vec value = S::mul(level[j / W], S::set1(scale[b]));
            if constexpr (L::adds_tau) value = S::add(value, S::set1(tau[b]));
            S::store(weight + 64 * i + j, value);
        }
    });
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

// An input from a group of 32 columns on.
inline TokenInput from_group(const TokenInput &in, std::size_t g) {
    if (in.codes == nullptr) return {in.x + g * group_size, in.sum + g, nullptr, nullptr, nullptr, nullptr};
    return {in.x + g * group_size, in.sum + g,        in.scale + g,
            in.code_sum + g,       in.code_total + g, in.codes + g * group_size};
}

// What a row owes to sums of inputs, and in fast mode the scale of every group: weight's times input's.
template <class S, class L, Mode mode>
typename S::Vec sum_terms(std::size_t blocks, const float *scale, const float *tau, const TokenInput &in, float step,
                          float offset, float *fine) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width, G = L::groups;
    Vec total = S::zero();
    for (std::size_t b = 0; b < blocks; b += W) {
        const std::size_t n = G * smaller(W, blocks - b);  // groups left for these vectors
        Vec s[2], t[2];
        if constexpr (G == 1) {
            s[0] = S::load(scale + b);
            if constexpr (L::adds_tau) t[0] = S::load(tau + b);
        } else {
            S::twice(S::load(scale + b), s);
            if constexpr (L::adds_tau) S::twice(S::load(tau + b), t);
        }
        for (std::size_t i = 0; i < G; ++i) {
            const std::size_t at = G * b + i * W, left = n > i * W ? n - i * W : 0;
            if constexpr (L::adds_tau) total = S::add_product(t[i], in.sum + at, left, total);
            if constexpr (mode == Mode::fast) {
                total = S::add_product(S::mul(s[i], S::set1(offset)), in.code_sum + at, left, total);
                S::store(fine + at, S::mul(S::mul(s[i], S::set1(step)), S::load_part(in.scale + at, left)));
            }
        }
    }
    return total;
}

template <class S, class L>
typename S::Vec dot_exact(const std::uint8_t *codes, std::size_t blocks, const float *scale, const float *x,
                          const typename S::Levels &levels, typename S::Vec total) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width, per_block = L::block / W;
    Vec part_sums[unroll] = {total, S::zero(), S::zero(), S::zero()};
    for_each_step<L>(codes, blocks, [&](const std::uint8_t *p, std::size_t i, std::size_t u) {
        Vec level[64 / W];
        S::template decode<L>(p, levels, level);
        for (std::size_t b = 0; b < 64 / L::block; ++b) {
            Vec part = S::mul(level[b * per_block], S::load(x + 64 * i + b * L::block));
            for (std::size_t j = 1; j < per_block; ++j) {
                part = S::fma(level[b * per_block + j], S::load(x + 64 * i + b * L::block + j * W), part);
            }
            part_sums[u] = S::fma(part, S::set1(scale[i * (64 / L::block) + b]), part_sums[u]);
        }
    });
    return S::add(S::add(part_sums[0], part_sums[1]), S::add(part_sums[2], part_sums[3]));
}

template <class S, class L>
typename S::Vec dot_fast(const std::uint8_t *codes, std::size_t blocks, const float *fine, const std::int8_t *x,
                         const typename S::Codes &table, typename S::Vec total) {
    using Vec = typename S::Vec;
    Vec part_sums[unroll] = {total, S::zero(), S::zero(), S::zero()};
    for_each_step<L>(codes, blocks, [&](const std::uint8_t *p, std::size_t i, std::size_t u) {
        part_sums[u] = S::template dot<L>(p, table, x + 64 * i, fine + 2 * i, part_sums[u]);
    });
    return S::add(S::add(part_sums[0], part_sums[1]), S::add(part_sums[2], part_sums[3]));
}

template <class S, class L, Mode mode>
void gemv_blocks(const Matrix &w, const TokenInput &x, std::size_t r0, std::size_t r1, float *y, Store store) {
    alignas(64) float scale[max_blocks + slack], tau[max_blocks + slack], fine[2 * max_blocks + slack];
    const std::size_t nb = w.blocks_per_row();
    const std::size_t rows_at_once = L::lead != 0 || nb == 0 || nb > max_blocks ? 1 : max_blocks / nb;
    const CodeTable &code_table = code_table_of(w);
    const auto levels = S::template levels<L>(levels_of(w));
    const auto table = S::template codes<L>(code_table);
    const float offset = S::code_offset(code_table);
    for (std::size_t row = r0; row < r1; row += rows_at_once) {
        const std::size_t rows = smaller(rows_at_once, r1 - row);
        for (std::size_t b = 0; b < nb || b == 0; b += max_blocks) {
            const std::size_t n = smaller(max_blocks, nb - b), k = row * nb + b;
            const TokenInput in = from_group(x, b * L::groups);
            expand<S, L>(w, k, rows * n, scale, tau);
            scale[rows * n] = 0.0f;  // of the zero block behind an odd last one
            const std::uint8_t *codes = static_cast<const std::uint8_t *>(w.data) + k * L::stride + L::lead;
            for (std::size_t i = 0; i < rows; ++i, codes += n * L::stride) {
                auto total = sum_terms<S, L, mode>(n, scale + i * n, tau + i * n, in, code_table.step, offset, fine);
                if constexpr (mode == Mode::exact) {
                    total = dot_exact<S, L>(codes, n, scale + i * n, in.x, levels, total);
                } else {
                    fine[n * L::groups] = 0.0f;  // likewise
                    total = dot_fast<S, L>(codes, n, fine, in.codes, table, total);
                }
                store_to(y + row + i, S::sum(total), b == 0 ? store : Store::add);
            }
        }
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

template <class S>
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
        if (x.mode() == Mode::exact) gemv_blocks<S, L, Mode::exact>(w, in, r0, r1, y, store);
        else gemv_blocks<S, L, Mode::fast>(w, in, r0, r1, y, store);
    });
}

}  // namespace
}  // namespace irq
