// Fast matrix times matrix over vector operations S that multiply 16-bit integers and add pairs. Panels of
// two registers of rows x 1024 columns are decoded to 16-bit codes on the stack (32 or 64 KiB), so that one
// register holds 2 columns of `width` rows: lanes are rows, no sum goes across them, and two inputs of a
// token are one broadcast. Inside a block everything is integer; scale and offset meet the sum once.
#pragma once

#include "simd_gemm.h"

namespace irq {
namespace {

constexpr std::size_t code_columns = 1024;

template <class S>
struct CodePanel {
    static constexpr std::size_t rows = 2 * S::width;
    alignas(64) std::int16_t codes[code_columns / 2][rows][2];  // of columns 2k, 2k + 1
    alignas(64) float scale[code_columns / 32][rows];           // of blocks, times the code table's step
    alignas(64) float tau[code_columns / 32][rows];
};

// Blocks [b0, b0 + n) of `rows` rows; rows up to the next multiple of the width are zeros.
template <class S, class L>
void pack_panel(const Matrix &w, std::size_t row, std::size_t rows, std::size_t b0, std::size_t n,
                CodePanel<S> *panel) {
    using Words = typename S::Words;
    constexpr std::size_t W = S::width, N = L::block / (2 * W);
    alignas(64) float scale[code_columns / 32 + slack], tau[code_columns / 32 + slack];
    const CodeTable &table = code_table_of(w);
    const auto codes = S::template codes<L>(table);
    const std::size_t padded_rows = (rows + W - 1) / W * W;
    for (std::size_t r = 0; r < padded_rows; ++r) {
        if (r < rows) expand<S, L>(w, (row + r) * w.blocks_per_row() + b0, n, scale, tau);
        for (std::size_t b = 0; b < n; ++b) {
            panel->scale[b][r] = r < rows ? scale[b] * table.step : 0.0f;
            if constexpr (L::adds_tau) panel->tau[b][r] = r < rows ? tau[b] : 0.0f;
        }
    }
    for (std::size_t r = 0; r < padded_rows; r += W) {
        for (std::size_t b = 0; b < n; ++b) {
            Words block[N][W];
            for (std::size_t k = 0; k < W; ++k) {
                Words one[N];
                const std::uint8_t *data = row_data(w, row + smaller(r + k, rows - 1)) + L::lead;
                S::template unpack<L>(data + (b0 + b) * L::stride, codes, one);
                for (std::size_t i = 0; i < N; ++i) block[i][k] = one[i];
            }
            for (std::size_t i = 0; i < N; ++i) {
                S::transpose(block[i]);
                for (std::size_t k = 0; k < W; ++k) {
                    S::store_words(panel->codes[b * (L::block / 2) + i * W + k][r], block[i][k]);
                }
            }
        }
    }
}

// y[t][r] for T tokens from `token` on and R registers of the panel's rows.
template <class S, class L, std::size_t R, std::size_t T>
void code_tile(const CodePanel<S> &panel, std::size_t rows, const Activations &x, std::size_t token,
               std::size_t column, std::size_t blocks, float *y, std::size_t ldy, Store store) {
    using Vec = typename S::Vec;
    constexpr std::size_t W = S::width, pairs = L::block / 2;
    const TokenInput first = x.token(token);
    const std::size_t stride = x.stride(), scales = stride / group_size, sums_stride = stride / L::block;
    const std::int16_t *in = first.codes + column;
    const float *in_scale = first.scale + column / span_size, *sums = block_sums<L>(first) + column / L::block;
    Vec total[R][T];
    for (auto &of_row : total) {
        for (auto &one : of_row) one = S::zero();
    }
    for (std::size_t b = 0; b < blocks; ++b) {
        typename S::Products products[R][T];
        for (auto &of_row : products) {
            for (auto &one : of_row) one = S::no_products();
        }
        for (std::size_t k = b * pairs; k < (b + 1) * pairs; ++k) {
            typename S::Words weight[R];
            for (std::size_t r = 0; r < R; ++r) weight[r] = S::load_words(panel.codes[k][W * r]);
            for (std::size_t t = 0; t < T; ++t) {
                const auto two = S::two_words(in + t * stride + 2 * k);
                for (std::size_t r = 0; r < R; ++r) {
                    products[r][t] = S::add_products(products[r][t], weight[r], two);
                }
            }
        }
        for (std::size_t r = 0; r < R; ++r) {
            const Vec scale = S::load(&panel.scale[b][W * r]);
            for (std::size_t t = 0; t < T; ++t) {
                const Vec both = S::mul(scale, S::set1(in_scale[t * scales + b * L::block / span_size]));
                total[r][t] = S::fma(S::to_float(products[r][t]), both, total[r][t]);
                if constexpr (L::adds_tau) {
                    const Vec tau = S::load(&panel.tau[b][W * r]);
                    total[r][t] = S::fma(tau, S::set1(sums[t * sums_stride + b]), total[r][t]);
                }
            }
        }
    }
    for (std::size_t t = 0; t < T; ++t) {
        for (std::size_t r = 0; r < R; ++r) {
            float *out = y + t * ldy + W * r;
            const std::size_t left = rows - W * r;
            if (left >= W) {
                S::store(out, store == Store::add ? S::add(S::load(out), total[r][t]) : total[r][t]);
                continue;
            }
            float last[W];
            S::store(last, total[r][t]);
            for (std::size_t i = 0; i < left; ++i) store_to(out + i, last[i], store);
        }
    }
}

// All tokens, T at a time and then the rest.
template <class S, class L, std::size_t R, std::size_t T = S::code_tokens>
void code_panel_times(const CodePanel<S> &panel, std::size_t rows, const Activations &x, std::size_t token,
                      std::size_t column, std::size_t blocks, float *y, std::size_t ldy, Store store) {
    for (; token + T <= x.tokens(); token += T) {
        code_tile<S, L, R, T>(panel, rows, x, token, column, blocks, y + token * ldy, ldy, store);
    }
    if constexpr (T > 1) code_panel_times<S, L, R, T - 1>(panel, rows, x, token, column, blocks, y, ldy, store);
}

template <class S, class L>
void gemm_codes(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
                Store store) {
    CodePanel<S> panel;
    constexpr std::size_t at_once = code_columns / L::block;
    const std::size_t nb = w.blocks_per_row();
    for (std::size_t row = r0; row < r1; row += panel.rows) {
        const std::size_t rows = smaller(panel.rows, r1 - row);
        for (std::size_t b = 0; b < nb; b += at_once) {
            const std::size_t n = smaller(at_once, nb - b), column = b * L::block;
            const Store how = b == 0 ? store : Store::add;
            pack_panel<S, L>(w, row, rows, b, n, &panel);
            if (rows > S::width) code_panel_times<S, L, 2>(panel, rows, x, 0, column, n, y + row, ldy, how);
            else code_panel_times<S, L, 1>(panel, rows, x, 0, column, n, y + row, ldy, how);
        }
    }
}

template <class S>
void gemm_rows_by_mode(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y,
                       std::size_t ldy, Store store) {
    const bool codes = x.mode() == Mode::fast && !is_float(w.format) && x.tokens() > few_tokens && w.columns != 0;
    if (!codes) return gemm_rows<S>(w, x, r0, r1, y, ldy, store);
    with_layout(w, [&](auto layout) { gemm_codes<S, decltype(layout)>(w, x, r0, r1, y, ldy, store); });
}

}  // namespace
}  // namespace irq
