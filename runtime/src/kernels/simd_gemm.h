// Matrix times matrix over vector operations S, in float32: panels of 8 rows x 1024 columns are decoded onto the stack
// (32 KiB) and multiplied in tiles of tile_rows x tile_tokens dot products, all of them in registers. A few tokens stay
// in L1 while the panel passes by.
#pragma once

#include "simd_gemv.h"

namespace irq {
namespace {

constexpr std::size_t panel_rows = 8, panel_columns = 1024;

// Rows of a panel lie so far apart: as the inputs, of which some zeros follow the last.
constexpr std::size_t padded_columns(std::size_t n) { return (n + 63) / 64 * 64; }

// y[t][r] for R rows, four at most, and T tokens over n columns (a multiple of 64).
template <class S, std::size_t R, std::size_t T>
void tile(std::size_t n, const float *panel, const float *x, std::size_t ldx, float *y, std::size_t ldy,
          Store store) {
    using Vec = typename S::Vec;
    Vec total[R][T];
    for (std::size_t r = 0; r < R; ++r) {
        for (std::size_t t = 0; t < T; ++t) total[r][t] = S::zero();
    }
    for (std::size_t i = 0; i < n; i += S::width) {
        Vec weight[R];
        for (std::size_t r = 0; r < R; ++r) weight[r] = S::load(panel + r * n + i);
        for (std::size_t t = 0; t < T; ++t) {
            const Vec input = S::load(x + t * ldx + i);
            for (std::size_t r = 0; r < R; ++r) total[r][t] = S::fma(weight[r], input, total[r][t]);
        }
    }
    for (std::size_t t = 0; t < T; ++t) {
        float *out = y + t * ldy;
        Vec of_rows[4] = {S::zero(), S::zero(), S::zero(), S::zero()};  // fewer rows: the bits they have among four
        for (std::size_t r = 0; r < R; ++r) of_rows[r] = total[r][t];
        float sums[4];
        S::sums(of_rows, sums);
        for (std::size_t r = 0; r < R; ++r) store_to(out + r, sums[r], store);
    }
}

// All tokens from `token` on, T at a time and then the rest.
template <class S, std::size_t T = S::tile_tokens>
void panel_times(std::size_t rows, std::size_t n, const float *panel, const Activations &x, std::size_t token,
                 std::size_t c0, float *y, std::size_t ldy, Store store) {
    constexpr std::size_t R = S::tile_rows;
    const std::size_t ldx = x.stride();
    for (; token + T <= x.tokens(); token += T) {
        const float *in = x.token(token).x + c0;
        float *out = y + token * ldy;
        std::size_t r = 0;
        for (; r + R <= rows; r += R) tile<S, R, T>(n, panel + r * n, in, ldx, out + r, ldy, store);
        for (; r < rows; ++r) tile<S, 1, T>(n, panel + r * n, in, ldx, out + r, ldy, store);
    }
    if constexpr (T > 1) panel_times<S, T - 1>(rows, n, panel, x, token, c0, y, ldy, store);
}

template <class S>
void decode_panel(const Matrix &w, std::size_t row, std::size_t rows, std::size_t c0, std::size_t n, float *panel) {
    for (std::size_t r = 0; r < rows; ++r) {
        float *out = panel + r * padded_columns(n);
        if (is_float(w.format)) {
            decode_floats<S>(w, row + r, c0, n, out);
        } else {
            with_layout(w, [&](auto layout) {
                using L = decltype(layout);
                decode_blocks<S, L>(w, row + r, c0 / L::block, n / L::block, out);
            });
        }
        for (std::size_t i = n; i < padded_columns(n); ++i) out[i] = 0.0f;  // meets the zeros behind x
    }
}

template <class S, template <class, class> class FastDot = WordDot>
void gemm_rows(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
               Store store) {
    if (is_few(x) || w.columns == 0) {
        for (std::size_t r = r0; r < r1; r += row_tile) {  // a few rows stay in L1 from token to token
            const std::size_t end = smaller(r + row_tile, r1);
            for (std::size_t t = 0; t < x.tokens(); ++t) gemv_rows<S, FastDot>(w, x, t, r, end, y + t * ldy, store);
        }
        return;
    }
    alignas(64) float panel[panel_rows * panel_columns];
    for (std::size_t row = r0; row < r1; row += panel_rows) {
        const std::size_t rows = smaller(panel_rows, r1 - row);
        for (std::size_t c0 = 0; c0 < w.columns; c0 += panel_columns) {
            const std::size_t n = smaller(panel_columns, w.columns - c0), padded = padded_columns(n);
            const Store how = c0 == 0 ? store : Store::add;
            decode_panel<S>(w, row, rows, c0, n, panel);
            panel_times<S>(rows, padded, panel, x, 0, c0, y + row, ldy, how);
        }
    }
}

}  // namespace
}  // namespace irq
