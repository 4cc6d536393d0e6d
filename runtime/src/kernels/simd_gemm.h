// Matrix times matrix over vector operations S, in float32: panels of 16 rows x 1024 columns are decoded
// onto the stack (64 KiB, which L2 holds while every token passes by) and multiplied in tiles of
// tile_rows x tile_tokens dot products, all of them in registers.
#pragma once

#include "simd_gemv.h"

namespace irq {
namespace {

constexpr std::size_t panel_rows = 16, panel_columns = 1024;

// y[t][r] for R rows and T tokens over n columns (a multiple of 64).
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
        for (std::size_t r = 0; r < R; ++r) weight[r] = S::load(panel + r * panel_columns + i);
        for (std::size_t t = 0; t < T; ++t) {
            const Vec input = S::load(x + t * ldx + i);
            for (std::size_t r = 0; r < R; ++r) total[r][t] = S::fma(weight[r], input, total[r][t]);
        }
    }
    for (std::size_t t = 0; t < T; ++t) {
        for (std::size_t r = 0; r < R; ++r) store_to(y + t * ldy + r, S::sum(total[r][t]), store);
    }
}

// The last tokens: T or fewer.
template <class S, std::size_t R, std::size_t T>
void tile_tail(std::size_t tokens, std::size_t n, const float *panel, const float *x, std::size_t ldx, float *y,
               std::size_t ldy, Store store) {
    if (tokens == T) return tile<S, R, T>(n, panel, x, ldx, y, ldy, store);
    if constexpr (T > 1) tile_tail<S, R, T - 1>(tokens, n, panel, x, ldx, y, ldy, store);
}

template <class S, std::size_t R>
void panel_times(std::size_t n, const float *panel, const Activations &x, std::size_t c0, float *y,
                 std::size_t ldy, Store store) {
    constexpr std::size_t T = S::tile_tokens;
    const std::size_t ldx = x.stride();
    std::size_t t = 0;
    for (; t + T <= x.tokens(); t += T) tile<S, R, T>(n, panel, x.token(t).x + c0, ldx, y + t * ldy, ldy, store);
    if (t < x.tokens()) tile_tail<S, R, T>(x.tokens() - t, n, panel, x.token(t).x + c0, ldx, y + t * ldy, ldy, store);
}

template <class S>
void decode_panel(const Matrix &w, std::size_t row, std::size_t rows, std::size_t c0, std::size_t n, float *panel) {
    for (std::size_t r = 0; r < rows; ++r) {
        float *out = panel + r * panel_columns;
        if (is_float(w.format)) {
            decode_floats<S>(w, row + r, c0, n, out);
        } else {
            with_layout(w, [&](auto layout) {
                using L = decltype(layout);
                decode_blocks<S, L>(w, row + r, c0 / L::block, n / L::block, out);
            });
        }
        for (std::size_t i = n; i % 64 != 0; ++i) out[i] = 0.0f;  // meets the zeros behind x
    }
}

template <class S, template <class, class> class FastDot = WordDot>
void gemm_rows(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
               Store store) {
    constexpr std::size_t R = S::tile_rows;
    if (is_few(x) || w.columns == 0) {
        for (std::size_t r = r0; r < r1; r += panel_rows) {  // a few rows stay in L1 from token to token
            const std::size_t end = smaller(r + panel_rows, r1);
            for (std::size_t t = 0; t < x.tokens(); ++t) gemv_rows<S, FastDot>(w, x, t, r, end, y + t * ldy, store);
        }
        return;
    }
    alignas(64) float panel[panel_rows * panel_columns];
    for (std::size_t row = r0; row < r1; row += panel_rows) {
        const std::size_t rows = smaller(panel_rows, r1 - row);
        for (std::size_t c0 = 0; c0 < w.columns; c0 += panel_columns) {
            const std::size_t n = smaller(panel_columns, w.columns - c0), padded = (n + 63) / 64 * 64;
            const Store how = c0 == 0 ? store : Store::add;
            decode_panel<S>(w, row, rows, c0, n, panel);
            std::size_t r = 0;
            for (; r + R <= rows; r += R) {
                panel_times<S, R>(padded, panel + r * panel_columns, x, c0, y + row + r, ldy, how);
            }
            for (; r < rows; ++r) {
                panel_times<S, 1>(padded, panel + r * panel_columns, x, c0, y + row + r, ldy, how);
            }
        }
    }
}

}  // namespace
}  // namespace irq
