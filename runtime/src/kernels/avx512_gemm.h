// Fast matrix times matrix on AVX-512 VNNI: panels of 32 rows x 1024 columns are unpacked to 8-bit codes, interleaved so
// that one register holds 4 columns of 16 rows, which is what vpdpbusd wants when lanes are rows: no sum across lanes,
// and four inputs of a token are one broadcast. 40 KiB of stack.
#pragma once

#include "avx512_bytes.h"
#include "simd_gemm.h"

namespace irq {
namespace {

constexpr std::size_t byte_rows = 32, byte_columns = 1024, byte_tokens = 6;

struct BytePanel {
    alignas(64) std::uint8_t codes[byte_columns / 4][byte_rows][4];  // of columns 4k..4k+3
    alignas(64) float scale[byte_columns / 32][byte_rows];           // of blocks, times the table's step
    alignas(64) float tau[byte_columns / 32][byte_rows];             // with the residual offset
};

// 64 codes of one row, in order; behind an odd last block of 32 stand zeros.
template <class L>
__m512i unpack_step(const std::uint8_t *codes, std::size_t step, std::size_t blocks, const Avx512::Codes &table) {
    constexpr std::size_t per_step = 64 / L::block;
    codes += step * per_step * L::stride;
    if ((step + 1) * per_step <= blocks) return Avx512::unpack<L>(codes, table);
    std::uint8_t last[2 * L::stride] = {};
    std::memcpy(last, codes, L::stride - L::lead);
    return Avx512::unpack<L>(last, table);
}

// values (rows, n) to panel (n, byte_rows), zeros behind the rows.
inline void interleave(const float *values, std::size_t rows, std::size_t n, float (*panel)[byte_rows]) {
    for (std::size_t b = 0; b < n; b += 16) {
        for (std::size_t r = 0; r < rows; r += 16) {
            __m512i v[16];
            for (std::size_t k = 0; k < 16; ++k) {
                v[k] = r + k < rows ? _mm512_loadu_si512(values + (r + k) * n + b) : _mm512_setzero_si512();
            }
            Avx512::transpose(v);
            for (std::size_t k = 0; k < 16; ++k) _mm512_store_si512(&panel[b + k][r], v[k]);
        }
    }
}

template <class L>
void pack_scales(const Matrix &w, std::size_t row, std::size_t rows, std::size_t b0, std::size_t n, BytePanel *panel) {
    alignas(64) float scale[byte_rows * (byte_columns / 32) + slack], tau[byte_rows * (byte_columns / 32) + slack];
    const ByteTable &table = byte_table_of(w);
    const std::size_t nb = w.blocks_per_row();
    if (n == nb) {
        expand<Avx512, L>(w, row * nb, rows * nb, scale, tau);
    } else {
        for (std::size_t r = 0; r < rows; ++r) expand<Avx512, L>(w, (row + r) * nb + b0, n, scale + r * n, tau + r * n);
    }
    const __m512 residual = _mm512_set1_ps(residual_offset(table));
    const __m512 step = _mm512_set1_ps(table.step);
    for (std::size_t i = 0; i < rows * n; i += 16) {
        const __m512 s = _mm512_load_ps(scale + i);
        if constexpr (L::adds_tau) _mm512_store_ps(tau + i, _mm512_fmadd_ps(s, residual, _mm512_load_ps(tau + i)));
        _mm512_store_ps(scale + i, _mm512_mul_ps(s, step));
    }
    interleave(scale, rows, n, panel->scale);
    if constexpr (L::adds_tau) interleave(tau, rows, n, panel->tau);
}

// Blocks [b0, b0 + n) of `rows` rows; rows up to the next multiple of 16 are zeros.
template <class L>
void pack_bytes(const Matrix &w, std::size_t row, std::size_t rows, std::size_t b0, std::size_t n, BytePanel *panel) {
    pack_scales<L>(w, row, rows, b0, n, panel);
    const auto codes = Avx512::codes<L>(byte_table_of(w), byte_bias - byte_table_of(w).bias);
    const std::size_t row_bytes = w.row_bytes(), steps = (n * L::block + 63) / 64;
    const std::uint8_t *data = row_data(w, row) + b0 * L::stride + L::lead;
    for (std::size_t r = 0; r < rows; r += 16) {
        for (std::size_t i = 0; i < steps; ++i) {
            __m512i v[16];
            for (std::size_t k = 0; k < 16; ++k) {
                v[k] = unpack_step<L>(data + smaller(r + k, rows - 1) * row_bytes, i, n, codes);
            }
            Avx512::transpose(v);
            for (std::size_t c = 0; c < 16; ++c) _mm512_store_si512(panel->codes[16 * i + c][r], v[c]);
        }
    }
}

// y[t][r] for T tokens from `token` on and the panel's rows, R registers of 16.
template <class L, std::size_t R, std::size_t T>
void byte_tile(const BytePanel &panel, std::size_t rows, const Activations &x, std::size_t token, std::size_t column,
               std::size_t blocks, float *y, std::size_t ldy, Store store) {
    constexpr std::size_t per_block = L::block / group_size;
    const TokenInput first = x.token(token);
    const std::size_t stride = x.stride(), groups = stride / group_size, sums_stride = stride / L::block;
    const std::int32_t *in_start = first.start + column / group_size;
    const float *in_scale = first.scale + column / group_size, *sums = block_sums<L>(first) + column / L::block;
    const std::int8_t *in = first.bytes + column;
    __m512 total[R][T];
    for (std::size_t r = 0; r < R; ++r) {
        for (std::size_t t = 0; t < T; ++t) total[r][t] = _mm512_setzero_ps();
    }
    for (std::size_t g = 0; g < blocks * per_block; ++g) {
        __m512i products[R][T];
        for (std::size_t t = 0; t < T; ++t) {
            const __m512i start = _mm512_set1_epi32(in_start[t * groups + g]);
            for (std::size_t r = 0; r < R; ++r) products[r][t] = start;
        }
#pragma GCC unroll 8
        for (std::size_t k = 0; k < group_size / 4; ++k) {
            __m512i codes[R];
            for (std::size_t r = 0; r < R; ++r) {
                codes[r] = _mm512_load_si512(panel.codes[g * (group_size / 4) + k][16 * r]);
            }
            for (std::size_t t = 0; t < T; ++t) {
                const __m512i four = _mm512_set1_epi32(load_as<std::int32_t>(in + 2 * t * stride + g * group_size + 4 * k));
                for (std::size_t r = 0; r < R; ++r) {
                    products[r][t] = _mm512_dpbusd_epi32(products[r][t], codes[r], four);
                }
            }
        }
        const std::size_t b = g / per_block;
        for (std::size_t r = 0; r < R; ++r) {
            const __m512 scale = _mm512_load_ps(&panel.scale[b][16 * r]);
            for (std::size_t t = 0; t < T; ++t) {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in_scale[t * groups + g]));
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][t]), both, total[r][t]);
            }
        }
        if (!L::adds_tau || (g + 1) % per_block != 0) continue;
        for (std::size_t r = 0; r < R; ++r) {
            const __m512 tau = _mm512_load_ps(&panel.tau[b][16 * r]);
            for (std::size_t t = 0; t < T; ++t) {
                total[r][t] = _mm512_fmadd_ps(tau, _mm512_set1_ps(sums[t * sums_stride + b]), total[r][t]);
            }
        }
    }
    for (std::size_t r = 0; r < R; ++r) {
        const __mmask16 some = Avx512::first(rows - 16 * r);
        for (std::size_t t = 0; t < T; ++t) {
            float *out = y + t * ldy + 16 * r;
            __m512 value = total[r][t];
            if (store == Store::add) value = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), value);
            _mm512_mask_storeu_ps(out, some, value);
        }
    }
}

// All tokens, T at a time and then the rest.
template <class L, std::size_t R, std::size_t T = byte_tokens>
void byte_panel_times(const BytePanel &panel, std::size_t rows, const Activations &x, std::size_t token,
                      std::size_t column, std::size_t blocks, float *y, std::size_t ldy, Store store) {
    for (; token + T <= x.tokens(); token += T) {
        byte_tile<L, R, T>(panel, rows, x, token, column, blocks, y + token * ldy, ldy, store);
    }
    if constexpr (T > 1) byte_panel_times<L, R, T - 1>(panel, rows, x, token, column, blocks, y, ldy, store);
}

template <class L>
void gemm_blocks(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
                 Store store) {
    BytePanel panel;
    constexpr std::size_t at_once = byte_columns / L::block;
    const std::size_t nb = w.blocks_per_row();
    for (std::size_t row = r0; row < r1; row += byte_rows) {
        const std::size_t rows = smaller(byte_rows, r1 - row);
        for (std::size_t b = 0; b < nb; b += at_once) {
            const std::size_t n = smaller(at_once, nb - b), column = b * L::block;
            const Store how = b == 0 ? store : Store::add;
            pack_bytes<L>(w, row, rows, b, n, &panel);
            if (rows > 16) byte_panel_times<L, 2>(panel, rows, x, 0, column, n, y + row, ldy, how);
            else byte_panel_times<L, 1>(panel, rows, x, 0, column, n, y + row, ldy, how);
        }
    }
}

inline void gemm_bytes(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y,
                       std::size_t ldy, Store store) {
    const bool bytes = x.mode() == Mode::fast && !is_float(w.format) && x.tokens() > few_tokens && w.columns != 0;
    if (!bytes) return gemm_rows<Avx512, ByteDot>(w, x, r0, r1, y, ldy, store);
    with_layout(w, [&](auto layout) { gemm_blocks<decltype(layout)>(w, x, r0, r1, y, ldy, store); });
}

}  // namespace
}  // namespace irq
