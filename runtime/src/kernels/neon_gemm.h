// Fast matrix times matrix on AArch64 with the dot-product extension: panels of 8 rows x 1024 columns are unpacked to
// signed 8-bit codes, interleaved so that one register holds 4 columns of 4 rows. sdot multiplies it by 4 columns of a
// token, any lane of a register of 16: lanes are rows, no sum goes across them. 10 KiB of stack, which L1 holds while
// every token passes by.
#pragma once

#include "neon_bytes.h"
#include "simd_gemm.h"

namespace irq {
namespace {

constexpr std::size_t byte_rows = 8, byte_columns = 1024, byte_tokens = 4;

struct BytePanel {
    alignas(64) std::int8_t codes[byte_columns / 4][byte_rows][4];  // of columns 4k..4k+3
    alignas(64) float scale[byte_columns / 32][byte_rows];          // of blocks, times the table's step
    alignas(64) float tau[byte_columns / 32][byte_rows];            // with the residual offset
};

// Blocks [b0, b0 + n) of `rows` rows, the last of which stands for those behind it too.
template <class L>
void pack_bytes(const Matrix &w, std::size_t row, std::size_t rows, std::size_t b0, std::size_t n, BytePanel *panel) {
    constexpr std::size_t N = L::block / 16;
    alignas(64) float scale[byte_columns / 32 + slack], tau[byte_columns / 32 + slack];
    const ByteTable &table = byte_table_of(w);
    const int8x16_t codes = signed_codes(table);
    const float residual = residual_offset(table);
    const std::uint8_t *data[byte_rows];
    for (std::size_t r = 0; r < byte_rows; ++r) {
        const std::size_t from = row + smaller(r, rows - 1);
        data[r] = row_data(w, from) + b0 * L::stride + L::lead;
        expand<Neon, L>(w, from * w.blocks_per_row() + b0, n, scale, tau);
        for (std::size_t b = 0; b < n; ++b) {
            panel->scale[b][r] = scale[b] * table.step;
            if constexpr (L::adds_tau) panel->tau[b][r] = scale[b] * residual + tau[b];
        }
    }
    for (std::size_t b = 0; b < n; ++b) {
        for (std::size_t r = 0; r < byte_rows; r += 4) {
            int32x4_t block[N][4];
            for (std::size_t k = 0; k < 4; ++k) {
                int8x16_t one[N];
                unpack_signed<L>(data[r + k] + b * L::stride, codes, one);
                for (std::size_t i = 0; i < N; ++i) block[i][k] = vreinterpretq_s32_s8(one[i]);
            }
            for (std::size_t i = 0; i < N; ++i) {
                transpose(block[i]);
                for (std::size_t k = 0; k < 4; ++k) {
                    vst1q_s8(panel->codes[b * (L::block / 4) + 4 * i + k][r], vreinterpretq_s8_s32(block[i][k]));
                }
            }
        }
    }
}

constexpr std::size_t row_registers = byte_rows / 4;

// Four columns of all rows, times those in lane `lane` of every token's 16.
template <int lane, std::size_t T>
void add_columns(const std::int8_t (*codes)[4], const int8x16_t in[T], int32x4_t products[row_registers][T]) {
    for (std::size_t r = 0; r < row_registers; ++r) {
        const int8x16_t weight = vld1q_s8(codes[4 * r]);
        for (std::size_t t = 0; t < T; ++t) products[r][t] = vdotq_laneq_s32(products[r][t], weight, in[t], lane);
    }
}

// y[t][r] for T tokens from `token` on and the panel's rows.
template <class L, std::size_t T>
void byte_tile(const BytePanel &panel, std::size_t rows, const Activations &x, std::size_t token, std::size_t column,
               std::size_t blocks, float *y, std::size_t ldy, Store store) {
    constexpr std::size_t R = row_registers, per_block = L::block / group_size;
    TokenInput in[T];
    const float *sums[T];
    for (std::size_t t = 0; t < T; ++t) {
        in[t] = x.token(token + t);
        in[t].scale += column / group_size;
        in[t].bytes += column;
        sums[t] = block_sums<L>(in[t]) + column / L::block;
    }
    float32x4_t total[R][T];
    for (auto &of_row : total) {
        for (auto &one : of_row) one = vdupq_n_f32(0.0f);
    }
    for (std::size_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 2
        for (std::size_t k = 0; k < per_block; ++k) {
            const std::size_t g = b * per_block + k;
            int32x4_t products[R][T];
            for (auto &of_row : products) {
                for (auto &one : of_row) one = vdupq_n_s32(0);
            }
            const std::int8_t(*codes)[byte_rows][4] = panel.codes + g * (group_size / 4);
#pragma GCC unroll 2
            for (std::size_t i = 0; i < group_size; i += 16) {
                int8x16_t columns[T];
                for (std::size_t t = 0; t < T; ++t) columns[t] = vld1q_s8(in[t].bytes + g * group_size + i);
                add_columns<0, T>(codes[i / 4], columns, products);
                add_columns<1, T>(codes[i / 4 + 1], columns, products);
                add_columns<2, T>(codes[i / 4 + 2], columns, products);
                add_columns<3, T>(codes[i / 4 + 3], columns, products);
            }
            for (std::size_t r = 0; r < R; ++r) {
                const float32x4_t scale = vld1q_f32(&panel.scale[b][4 * r]);
                for (std::size_t t = 0; t < T; ++t) {
                    const float32x4_t both = vmulq_n_f32(scale, in[t].scale[g]);
                    total[r][t] = vfmaq_f32(total[r][t], vcvtq_f32_s32(products[r][t]), both);
                }
            }
        }
        for (std::size_t r = 0; L::adds_tau && r < R; ++r) {
            const float32x4_t tau = vld1q_f32(&panel.tau[b][4 * r]);
            for (std::size_t t = 0; t < T; ++t) total[r][t] = vfmaq_n_f32(total[r][t], tau, sums[t][b]);
        }
    }
    for (std::size_t t = 0; t < T; ++t) {
        float of_rows[byte_rows];
        for (std::size_t r = 0; r < R; ++r) vst1q_f32(of_rows + 4 * r, total[r][t]);
        for (std::size_t r = 0; r < rows; ++r) store_to(y + t * ldy + r, of_rows[r], store);
    }
}

// All tokens, T at a time and then the rest.
template <class L, std::size_t T = byte_tokens>
void byte_panel_times(const BytePanel &panel, std::size_t rows, const Activations &x, std::size_t token,
                      std::size_t column, std::size_t blocks, float *y, std::size_t ldy, Store store) {
    for (; token + T <= x.tokens(); token += T) {
        byte_tile<L, T>(panel, rows, x, token, column, blocks, y + token * ldy, ldy, store);
    }
    if constexpr (T > 1) byte_panel_times<L, T - 1>(panel, rows, x, token, column, blocks, y, ldy, store);
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
            const std::size_t n = smaller(at_once, nb - b);
            pack_bytes<L>(w, row, rows, b, n, &panel);
            byte_panel_times<L>(panel, rows, x, 0, b * L::block, n, y + row, ldy, b == 0 ? store : Store::add);
        }
    }
}

inline void gemm_bytes(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y,
                       std::size_t ldy, Store store) {
    const bool bytes = x.mode() == Mode::fast && !is_float(w.format) && x.tokens() > few_tokens && w.columns != 0;
    if (!bytes) return gemm_rows<Neon, ByteDot>(w, x, r0, r1, y, ldy, store);
    with_layout(w, [&](auto layout) { gemm_blocks<decltype(layout)>(w, x, r0, r1, y, ldy, store); });
}

}  // namespace
}  // namespace irq
