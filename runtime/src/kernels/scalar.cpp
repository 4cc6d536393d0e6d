// The scalar kernels: the readable reference that the others are tested against, and the fallback.
#include <cmath>

#include "block_layout.h"

namespace irq {
namespace {

void copy_and_sum(const float *x, std::size_t columns, std::size_t stride, const TokenInput &out) {
    for (std::size_t i = 0; i < stride; ++i) out.x[i] = i < columns ? x[i] : 0.0f;
    for (std::size_t g = 0; g < stride / group_size; ++g) {
        out.sum[g] = 0.0f;
        for (std::size_t i = 0; i < group_size; ++i) out.sum[g] += out.x[g * group_size + i];
    }
    for (std::size_t s = 0; s < stride / span_size; ++s) out.span_sum[s] = out.sum[2 * s] + out.sum[2 * s + 1];
}

float largest_of(const float *x, std::size_t n) {
    float largest = 0.0f;
    for (std::size_t i = 0; i < n; ++i) largest = std::fmax(largest, std::fabs(x[i]));
    return largest;
}

void prepare_words(const float *x, std::size_t columns, std::size_t stride, bool, const TokenInput &out) {
    copy_and_sum(x, columns, stride, out);
    if (out.codes == nullptr) return;
    for (std::size_t s = 0; s < stride / span_size; ++s) {
        if (!std::isfinite(out.span_sum[s])) {
            mark_not_finite(out, s);
            continue;
        }
        const float *span = out.x + s * span_size;
        const float largest = largest_of(span, span_size), rate = code_rate(largest, largest_input_code);
        for (std::size_t i = 0; i < span_size; ++i) {
            out.codes[s * span_size + i] = static_cast<std::int16_t>(std::nearbyint(span[i] * rate));
        }
        out.scale[s] = largest / largest_input_code;
    }
}

void prepare_bytes(const float *x, std::size_t columns, std::size_t stride, bool for_gemv, const TokenInput &out) {
    copy_and_sum(x, columns, stride, out);
    if (out.codes == nullptr) return;
    const std::size_t size = for_gemv ? span_size : group_size;  // columns with one scale
    for (std::size_t k = 0; k < stride / size; ++k) {
        const std::size_t s = k * size / span_size;
        if (!std::isfinite(out.span_sum[s])) {
            mark_not_finite_bytes(out, for_gemv, s);
            continue;
        }
        const float *x_k = out.x + k * size;
        const float largest = largest_of(x_k, size), rate = code_rate(largest, largest_byte);
        std::int8_t *high = out.bytes + (for_gemv ? 2 * k * size : k * size), *low = high + span_size;
        for (std::size_t i = 0; i < size; ++i) {
            const float value = x_k[i] * rate, rounded = std::nearbyint(value);
            high[i] = static_cast<std::int8_t>(rounded);
            if (!for_gemv) continue;
            low[i] = static_cast<std::int8_t>(std::fmin(127.0f, std::nearbyint((value - rounded) * low_terms)));
        }
        out.scale[k] = largest / largest_byte;
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
float dot_words(const Matrix &w, std::size_t row, const TokenInput &in) {
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

// What the kernels of bytes compute: with signed codes, level 0 at about 0.
template <class L>
float dot_bytes(const Matrix &w, std::size_t row, const TokenInput &in, bool for_gemv) {
    const ByteTable &table = byte_table_of(w);
    const std::size_t size = for_gemv ? span_size : group_size;
    float total = 0.0f;
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const std::uint8_t *block = row_data(w, row) + b * L::stride;
        const std::size_t k = row * w.blocks_per_row() + b;
        float part = 0.0f;
        for (std::size_t g = 0; g < L::block; g += group_size) {
            int sum = 0;
            for (std::size_t j = g; j < g + group_size; ++j) {
                const std::size_t column = b * L::block + j;
                const std::int8_t *bytes = in.bytes + (for_gemv ? column + column / span_size * span_size : column);
                const unsigned code = code_at<L>(block, j);
                const int weight = (L::bits == 8 ? static_cast<int>(code ^ 128u) : table.code[code & 15u]) - table.bias;
                sum += weight * (for_gemv ? 256 * bytes[0] + bytes[span_size] : bytes[0]);
            }
            part += in.scale[(b * L::block + g) / size] * static_cast<float>(sum);
        }
        const float scale = block_scale(w, block, k), step = for_gemv ? table.step / low_terms : table.step;
        const float offset = scale * residual_offset(table);
        total += scale * step * part + (block_tau(w, block, k) + offset) * block_sums<L>(in)[b];
    }
    return total;
}

float dot_float(const Matrix &w, std::size_t row, const float *x) {
    float total = 0.0f;
    for (std::size_t i = 0; i < w.columns; ++i) total += float_at(w.format, row_data(w, row), i) * x[i];
    return total;
}

template <class Product>
void rows_times(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
                Store store, Product &&fast_product) {
    const TokenInput in = x.token(token);
    for (std::size_t row = r0; row < r1; ++row) {
        if (is_float(w.format)) {
            store_to(y + row, dot_float(w, row, in.x), store);
            continue;
        }
        with_layout(w, [&](auto layout) {
            const bool exact = x.mode() == Mode::exact;
            store_to(y + row, exact ? dot_exact<decltype(layout)>(w, row, in) : fast_product(layout, row, in), store);
        });
    }
}

void gemv_words(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
                Store store) {
    rows_times(w, x, token, r0, r1, y, store, [&](auto layout, std::size_t row, const TokenInput &in) {
        return dot_words<decltype(layout)>(w, row, in);
    });
}

void gemv_bytes(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
                Store store) {
    rows_times(w, x, token, r0, r1, y, store, [&](auto layout, std::size_t row, const TokenInput &in) {
        return dot_bytes<decltype(layout)>(w, row, in, x.tokens() <= few_tokens);
    });
}

void gemm_words(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
                Store store) {
    for (std::size_t t = 0; t < x.tokens(); ++t) gemv_words(w, x, t, r0, r1, y + t * ldy, store);
}

void gemm_bytes(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
                Store store) {
    for (std::size_t t = 0; t < x.tokens(); ++t) gemv_bytes(w, x, t, r0, r1, y + t * ldy, store);
}

}  // namespace

const KernelTable scalar_kernels = {prepare_words, decode_rows, gemv_words, gemm_words};
const KernelTable scalar8_kernels = {prepare_bytes, decode_rows, gemv_bytes, gemm_bytes};

}  // namespace irq
