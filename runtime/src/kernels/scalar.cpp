// The scalar kernels: the readable reference that the others are tested against, and the fallback.
#include <cmath>

#include "block_layout.h"

namespace irq {
namespace {

void prepare_token(const float *x, std::size_t columns, std::size_t stride, const TokenInput &out) {
    for (std::size_t i = 0; i < stride; ++i) out.x[i] = i < columns ? x[i] : 0.0f;
    for (std::size_t g = 0; g < stride / group_size; ++g) {
        const float *group = out.x + g * group_size;
        float total = 0.0f, largest = 0.0f;
        for (std::size_t i = 0; i < group_size; ++i) {
            total += group[i];
            largest = std::fmax(largest, std::fabs(group[i]));
        }
        out.sum[g] = total;
        if (out.codes == nullptr) continue;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        int code_total = 0;
        for (std::size_t i = 0; i < group_size; ++i) {
            const int code = static_cast<int>(std::nearbyint(group[i] * inverse));
            out.codes[g * group_size + i] = static_cast<std::int8_t>(code);
            code_total += code;
        }
        out.scale[g] = largest / 127.0f;
        out.code_total[g] = code_total;
        out.code_sum[g] = out.scale[g] * static_cast<float>(code_total);
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
float dot_exact(const Matrix &w, std::size_t row, const float *x, const float *sum) {
    float total = 0.0f;
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const std::uint8_t *block = row_data(w, row) + b * L::stride;
        const std::size_t k = row * w.blocks_per_row() + b;
        float part = 0.0f, block_sum = 0.0f;
        for (std::size_t j = 0; j < L::block; ++j) {
            part += level_at<L>(levels_of(w), block, j) * x[b * L::block + j];
        }
        for (std::size_t g = 0; g < L::groups; ++g) block_sum += sum[b * L::groups + g];
        total += block_scale(w, block, k) * part + block_tau(w, block, k) * block_sum;
    }
    return total;
}

template <class L>
float dot_fast(const Matrix &w, std::size_t row, const TokenInput &in) {
    const CodeTable &table = code_table_of(w);
    float total = 0.0f;
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const std::uint8_t *block = row_data(w, row) + b * L::stride;
        const std::size_t k = row * w.blocks_per_row() + b;
        const float scale = block_scale(w, block, k), tau = block_tau(w, block, k);
        for (std::size_t g = b * L::groups; g < (b + 1) * L::groups; ++g) {
            int part = 0;
            for (std::size_t i = 0; i < group_size; ++i) {
                const unsigned code = code_at<L>(block, (g * group_size + i) % L::block);
                const int weight = L::bits == 8 ? static_cast<int>(code ^ 0x80u) : table.code[code & 15u];
                part += weight * in.codes[g * group_size + i];
            }
            total += scale * table.step * in.scale[g] * static_cast<float>(part);
            total += scale * table.offset * in.code_sum[g] + tau * in.sum[g];
        }
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
            const float value = x.mode() == Mode::exact ? dot_exact<L>(w, row, in.x, in.sum) : dot_fast<L>(w, row, in);
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
