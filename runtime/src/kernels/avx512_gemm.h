// Fast matrix times matrix on AVX-512 VNNI: panels of 32 rows x 1024 columns are unpacked to 8-bit codes,
// interleaved so that one register holds 4 columns of 16 rows, which is what vpdpbusd wants when lanes are
// rows: no sum across lanes, and four inputs of a token are one broadcast. 40 KiB of stack, L1 or L2.
//
// Inside a group of 32 columns everything is integer, and the accumulator starts at -bias * (sum of the
// input's codes): what comes out belongs to signed codes, whose residual offset is 0 for the integer
// codebooks and a thousandth for the others, small enough to join tau.
#pragma once

#include "avx512_ops.h"
#include "simd_gemm.h"

namespace irq {
namespace {

constexpr std::size_t vnni_rows = 32, vnni_columns = 1024, vnni_tokens = 6;

struct VnniPanel {
    alignas(64) std::uint8_t codes[vnni_columns / 4][vnni_rows][4];  // of columns 4k..4k+3
    alignas(64) float scale[vnni_columns / group_size][vnni_rows];   // times the code table's step
    alignas(64) float tau[vnni_columns / group_size][vnni_rows];     // with the residual offset
    std::int32_t bias;
};

// Rows of 16 dwords become columns.
inline void transpose_dwords(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // v[i + c]: column c of each 128-bit lane, rows i..i+3
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {  // lanes 0 1 2 3 of rows 0-7 (a) and 8-15 (b)
        const __m512i a01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x44), a23 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xee);
        const __m512i b01 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x44);
        const __m512i b23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(a01, b01, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(a01, b01, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(a23, b23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(a23, b23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
}

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

// Blocks [b0, b0 + n) of `rows` rows; rows up to the next multiple of 16 are zeros.
template <class L>
void pack_panel(const Matrix &w, std::size_t row, std::size_t rows, std::size_t b0, std::size_t n,
                VnniPanel *panel) {
    alignas(64) float scale[vnni_columns / 32 + slack] = {}, tau[vnni_columns / 32 + slack] = {};
    const CodeTable &table = code_table_of(w);
    const auto codes = Avx512::codes<L>(table);
    const float residual = table.offset + table.step * static_cast<float>(table.bias);
    const std::size_t padded_rows = (rows + 15) / 16 * 16, groups = n * L::groups;
    panel->bias = table.bias;
    for (std::size_t r = 0; r < rows; ++r) {
        expand<Avx512, L>(w, (row + r) * w.blocks_per_row() + b0, n, scale, tau);
        for (std::size_t g = 0; g < groups; ++g) {
            const float s = scale[g / L::groups];
            panel->scale[g][r] = s * table.step;
            panel->tau[g][r] = tau[g / L::groups] + s * residual;
        }
    }
    for (std::size_t r = rows; r < padded_rows; ++r) {
        for (std::size_t g = 0; g < groups; ++g) panel->scale[g][r] = panel->tau[g][r] = 0.0f;
    }
    for (std::size_t r = 0; r < padded_rows; r += 16) {
        for (std::size_t i = 0; i < (groups + 1) / 2; ++i) {
            __m512i v[16];
            for (std::size_t k = 0; k < 16; ++k) {
                v[k] = _mm512_setzero_si512();
                if (r + k >= rows) continue;
                v[k] = unpack_step<L>(row_data(w, row + r + k) + b0 * L::stride + L::lead, i, n, codes);
            }
            transpose_dwords(v);
            for (std::size_t c = 0; c < 16; ++c) _mm512_store_si512(panel->codes[16 * i + c][r], v[c]);
        }
    }
}

// y[t][r] for T tokens from `token` on and the panel's rows, R registers of 16.
template <std::size_t R, std::size_t T>
void vnni_tile(const VnniPanel &panel, std::size_t rows, const Activations &x, std::size_t token,
               std::size_t g0, std::size_t groups, float *y, std::size_t ldy, Store store) {
    TokenInput in[T];
    for (std::size_t t = 0; t < T; ++t) in[t] = from_group(x.token(token + t), g0);
    __m512 total[R][T];
    for (std::size_t r = 0; r < R; ++r) {
        for (std::size_t t = 0; t < T; ++t) total[r][t] = _mm512_setzero_ps();
    }
    for (std::size_t g = 0; g < groups; ++g) {
        __m512i products[R][T];
        for (std::size_t t = 0; t < T; ++t) {
            const __m512i start = _mm512_set1_epi32(-panel.bias * in[t].code_total[g]);
            for (std::size_t r = 0; r < R; ++r) products[r][t] = start;
        }
        for (std::size_t k = 0; k < group_size / 4; ++k) {
            __m512i codes[R];
            for (std::size_t r = 0; r < R; ++r) {
                codes[r] = _mm512_load_si512(panel.codes[g * (group_size / 4) + k][16 * r]);
            }
            for (std::size_t t = 0; t < T; ++t) {
                const __m512i four = _mm512_set1_epi32(load_as<std::int32_t>(in[t].codes + g * group_size + 4 * k));
                for (std::size_t r = 0; r < R; ++r) {
                    products[r][t] = _mm512_dpbusd_epi32(products[r][t], codes[r], four);
                }
            }
        }
        for (std::size_t r = 0; r < R; ++r) {
            const __m512 scale = _mm512_load_ps(&panel.scale[g][16 * r]);
            const __m512 tau = _mm512_load_ps(&panel.tau[g][16 * r]);
            for (std::size_t t = 0; t < T; ++t) {
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in[t].scale[g]));
                total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][t]), both, total[r][t]);
                total[r][t] = _mm512_fmadd_ps(tau, _mm512_set1_ps(in[t].sum[g]), total[r][t]);
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
template <std::size_t R, std::size_t T = vnni_tokens>
void vnni_panel_times(const VnniPanel &panel, std::size_t rows, const Activations &x,
                      std::size_t token, std::size_t g0, std::size_t groups, float *y, std::size_t ldy, Store store) {
    for (; token + T <= x.tokens(); token += T) {
        vnni_tile<R, T>(panel, rows, x, token, g0, groups, y + token * ldy, ldy, store);
    }
    if constexpr (T > 1) vnni_panel_times<R, T - 1>(panel, rows, x, token, g0, groups, y, ldy, store);
}

template <class L>
void vnni_gemm(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
               Store store) {
    VnniPanel panel;
    constexpr std::size_t step = vnni_columns / L::block;
    const std::size_t nb = w.blocks_per_row();
    for (std::size_t row = r0; row < r1; row += vnni_rows) {
        const std::size_t rows = smaller(vnni_rows, r1 - row);
        for (std::size_t b = 0; b < nb; b += step) {
            const std::size_t n = smaller(step, nb - b), g0 = b * L::groups, groups = n * L::groups;
            const Store how = b == 0 ? store : Store::add;
            pack_panel<L>(w, row, rows, b, n, &panel);
            if (rows > 16) vnni_panel_times<2>(panel, rows, x, 0, g0, groups, y + row, ldy, how);
            else vnni_panel_times<1>(panel, rows, x, 0, g0, groups, y + row, ldy, how);
        }
    }
}

inline void gemm_rows_avx512(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y,
                             std::size_t ldy, Store store) {
    const bool vnni = x.mode() == Mode::fast && !is_float(w.format) && x.tokens() > few_tokens && w.columns != 0;
    if (!vnni) return gemm_rows<Avx512>(w, x, r0, r1, y, ldy, store);
    with_layout(w, [&](auto layout) { vnni_gemm<decltype(layout)>(w, x, r0, r1, y, ldy, store); });
}

}  // namespace
}  // namespace irq
