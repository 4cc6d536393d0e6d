// The scalar kernels: the readable reference that the others are tested against, and the fallback.
#include <cmath>

#include "block_layout.h"

namespace irq {
namespace {

void prepare_token(const float *x, std::size_t columns, std::size_t stride, const TokenInput &out) {
    for (std::size_t i = 0; i < stride; ++i) out.x[i] = i < columns ? x[i] : 0.0f;
    for (std::size_t g = 0; g < stride / group_size; ++g) {
        out.sum[g] = 0.0f;
        for (std::size_t i = 0; i < group_size; ++i) out.sum[g] += out.x[g * group_size + i];
    }
    for (std::size_t s = 0; s < stride / span_size; ++s) {
        out.span_sum[s] = out.sum[2 * s] + out.sum[2 * s + 1];
        if (out.codes == nullptr) continue;
        if (!std::isfinite(out.span_sum[s])) {
            mark_not_finite(out, s);
            continue;
        }
        const float *span = out.x + s * span_size;
        float largest = 0.0f;
        for (std::size_t i = 0; i < span_size; ++i) largest = std::fmax(largest, std::fabs(span[i]));
        const float inverse = code_rate(largest);
        for (std::size_t i = 0; i < span_size; ++i) {
            out.codes[s * span_size + i] = static_cast<std::int16_t>(std::nearbyint(span[i] * inverse));
        }
        out.scale[s] = largest / largest_input_code;
    }
}

// level[code], or the signed code itself.
template <class L>
float level_at(const float *levels, const std::uint8_t *block, std::size_t j) {
    const unsigned code = code_at<L>(block, j);
    if constexpr (L::bits == 8) return static_cast<float>(static_cast<std::int8_t>(code));
    else return levels[code];
}

template <class L>
void dequantize_blocks(const Matrix &w, std::size_t row, float *weight) {
    const float *levels = levels_of(w);
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const std::uint8_t *block = row_data(w, row) + b * L::stride;
        const std::size_t k = row * w.blocks_per_row() + b;
        const float scale = block_scale(w, block, k), tau = block_tau(w, block, k);
        for (std::size_t j = 0; j < L::block; ++j) {
            const float scaled = scale * level_at<L>(levels, block, j);
            weight[b * L::block + j] = L::adds_tau ? scaled + tau : scaled;
        }
    }
}

void decode_rows(const Matrix &w, std::size_t r0, std::size_t r1, float *weight) {
    for (std::size_t row = r0; row < r1; ++row, weight += w.columns) {
        if (is_float(w.format)) {
            for (std::size_t i = 0; i < w.columns; ++i) weight[i] = float_at(w.format, row_data(w, row), i);
        } else {
            with_layout(w, [&](auto layout) { dequantize_blocks<decltype(layout)>(w, row, weight); });
        }
    }
}

template <class L>
float dot_exact(const Matrix &w, std::size_t row, const TokenInput &in) {
    float total = 0.0f;
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const std::uint8_t *block = row_data(w, row) + b * L::stride;
        const std::size_t k = row * w.blocks_per_row() + b;
        float part = 0.0f;
        for (std::size_t j = 0; j < L::block; ++j) {
            part += level_at<L>(levels_of(w), block, j) * in.x[b * L::block + j];
        }
        total += block_scale(w, block, k) * part + block_tau(w, block, k) * block_sums<L>(in)[b];
    }
    return total;
}

template <class L>
float dot_fast(const Matrix &w, std::size_t row, const TokenInput &in) {
    const CodeTable &table = code_table_of(w);
    float total = 0.0f;
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const std::uint8_t *block = row_data(w, row) + b * L::stride;
        const std::size_t k = row * w.blocks_per_row() + b, column = b * L::block;
        int part = 0;
        for (std::size_t j = 0; j < L::block; ++j) {
            const unsigned code = code_at<L>(block, j);
            const int weight = L::bits == 8 ? static_cast<std::int8_t>(code) : table.code[code & 15u];
            part += weight * in.codes[column + j];
        }
        total += block_scale(w, block, k) * (table.step * in.scale[column / span_size]) * static_cast<float>(part);
        total += block_tau(w, block, k) * block_sums<L>(in)[b];
    }
    return total;
}

float dot_float(const Matrix &w, std::size_t row, const float *x) {
    float total = 0.0f;
    for (std::size_t i = 0; i < w.columns; ++i) total += float_at(w.format, row_data(w, row), i) * x[i];
    return total;
}

void gemv_rows(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
               Store store) {
    const TokenInput in = x.token(token);
    for (std::size_t row = r0; row < r1; ++row) {
        if (is_float(w.format)) {
            store_to(y + row, dot_float(w, row, in.x), store);
            continue;
        }
        with_layout(w, [&](auto layout) {
            using L = decltype(layout);
            const float value = x.mode() == Mode::exact ? dot_exact<L>(w, row, in) : dot_fast<L>(w, row, in);
            store_to(y + row, value, store);
        });
    }
}

void gemm_rows(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y,
               std::size_t ldy, Store store) {
    for (std::size_t t = 0; t < x.tokens(); ++t) gemv_rows(w, x, t, r0, r1, y + t * ldy, store);
}

}  // namespace

const KernelTable scalar_kernels = {prepare_token, decode_rows, gemv_rows, gemm_rows};

}  // namespace irq
