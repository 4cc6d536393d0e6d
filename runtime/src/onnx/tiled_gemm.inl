// The algorithm of tiled_gemm.h over a set of vector operations S, whose `width` lanes are rows of W. Included
// by one file per instruction set; everything has internal linkage.
#include <algorithm>
#include <cstring>

#include "tiled_gemm.h"

namespace irq::onnx {
namespace {

constexpr std::size_t chunk_columns = 1024;  // of a panel, which L2 keeps: fewer would add to y more often
constexpr std::size_t inputs_ahead = 1024;    // floats; without, 512 tokens cost 1.4 times as much
constexpr std::size_t max_blocks = chunk_columns / 32;

// Tokens of tile `tile` when `tokens` are shared out evenly: [begin, end).
struct TileRange {
    std::size_t begin, end;
};

TileRange tile_range(std::size_t tokens, std::size_t tiles, std::size_t tile) {
    return {tokens * tile / tiles, tokens * (tile + 1) / tiles};
}

// --- A: for every chunk of columns and every tile (columns of the chunk, tokens of the tile) ---

// n <= S::width rows of x, `width` columns of them: out[i * n + t].
template <class S, class T>
void pack_columns(const T *x, std::size_t k, std::size_t n, float *out) {
    constexpr std::size_t width = S::width;
    typename S::Vec square[width];
    for (std::size_t t = 0; t < width; ++t) square[t] = t < n ? S::load(x + t * k) : S::zero();
    S::transpose(square);
    for (std::size_t i = 0; i < width; ++i) {
        if (i * n + width <= width * n) {  // what is too much, the next column writes again
            S::store(out + i * n, square[i]);
        } else {
            alignas(64) float column[width];
            S::store(column, square[i]);
            std::memcpy(out + i * n, column, n * sizeof(float));
        }
    }
}

template <class S, class T>
void pack_tile(const T *a, std::size_t tokens, std::size_t k, std::size_t tile, float *packed) {
    const auto [begin, end] = tile_range(tokens, (tokens + S::tile_tokens - 1) / S::tile_tokens, tile);
    const std::size_t n = end - begin;
    for (std::size_t k0 = 0; k0 < k; k0 += chunk_columns) {
        const std::size_t columns = std::min(chunk_columns, k - k0);
        float *out = packed + k0 * tokens + columns * begin;
        for (std::size_t i = 0; i < columns; i += S::width) {
            pack_columns<S>(a + begin * k + k0 + i, k, n, out + i * n);
        }
    }
}

template <class S>
void pack(const void *a, bool is_half, std::size_t tokens, std::size_t k, std::size_t tile, float *packed) {
    static_assert(S::tile_tokens <= S::width, "a tile is transposed in one square");
    if (is_half) pack_tile<S>(static_cast<const std::uint16_t *>(a), tokens, k, tile, packed);
    else pack_tile<S>(static_cast<const float *>(a), tokens, k, tile, packed);
}

// --- W: one panel ---

template <class S>
struct Panel {
    static constexpr std::size_t rows = 2 * S::width;
    alignas(64) float weight[chunk_columns][rows];
    alignas(64) float scale[max_blocks][rows], tau[max_blocks][rows];
};

// Values of `blocks` blocks of each row, transposed; rows behind the last repeat it.
template <class T, class Widen>
void transpose_values(const T *values, std::size_t stride, std::size_t rows, std::size_t all_rows, std::size_t blocks,
                      float *out, Widen &&widen) {
    for (std::size_t r = 0; r < all_rows; ++r) {
        const T *row = values + std::min(r, rows - 1) * stride;
        for (std::size_t b = 0; b < blocks; ++b) out[b * all_rows + r] = widen(row[b]);
    }
}

template <class S>
void load_values(const BlockValues &v, std::size_t at, std::size_t stride, std::size_t rows, std::size_t blocks,
                 float (*out)[Panel<S>::rows]) {
    constexpr std::size_t all = Panel<S>::rows;
    if (v.storage == Storage::f32) {
        const auto *values = static_cast<const float *>(v.values) + at;
        transpose_values(values, stride, rows, all, blocks, out[0], [](float x) { return x; });
    } else if (v.storage == Storage::f16) {
        const auto *values = static_cast<const std::uint16_t *>(v.values) + at;
        transpose_values(values, stride, rows, all, blocks, out[0], [](std::uint16_t x) { return S::from_half(x); });
    } else {
        std::memset(out, 0, blocks * sizeof out[0]);
    }
}

// What turns the codes of one block of `width` rows into weights, column by column.
template <class S>
struct Decoder {
    typename S::Vec scale, tau;
    float *out;  // (block, Panel::rows)

    void put(std::size_t column, typename S::Vec level) const {
        S::store(out + column * Panel<S>::rows, S::add(S::mul(level, scale), tau));
    }
};

// Codes of `width` rows, `stride` bytes apart; the loops unroll.
template <class S, bool high_nibble_first>
void decode_4bit(const std::uint8_t *codes, std::size_t stride, std::size_t block_size, const typename S::Table &table,
                 const Decoder<S> &decoder) {
    for (std::size_t part = 0; part < block_size / 32; ++part) {
        typename S::Int word[4];
        S::load_words(codes + 16 * part, stride, word);
        for (std::size_t d = 0; d < 4; ++d) {
            for (unsigned i = 0; i < 8; ++i) {
                const std::size_t column = 32 * part + 8 * d + (high_nibble_first ? i ^ 1 : i);
                decoder.put(column, S::look_up_16(S::shift_right(word[d], 4 * i), table));
            }
        }
    }
}

template <class S, bool has_third_bit>
void decode_2bit(const std::uint8_t *codes, std::size_t stride, const typename S::Table &table,
                 const Decoder<S> &decoder) {
    typename S::Int word[4], high[2];
    S::load_words(codes, stride, word);
    if constexpr (has_third_bit) S::load_two_words(codes + 16, stride, high);
    for (std::size_t d = 0; d < 4; ++d) {
        for (unsigned i = 0; i < 16; ++i) {
            const unsigned column = static_cast<unsigned>(4 * d) + i / 4 + 16 * (i % 4), bit = column % 32;
            typename S::Int index = S::shift_right(word[d], 2 * i);
            if constexpr (has_third_bit) {
                const auto h = high[column / 32];
                index = S::with_third_bit(index, bit < 2 ? S::shift_left(h, 2 - bit) : S::shift_right(h, bit - 2));
            }
            decoder.put(column, S::look_up_8(index, table));
        }
    }
}

template <class S>
void decode_8bit(const std::uint8_t *codes, std::size_t stride, const Decoder<S> &decoder) {
    for (std::size_t part = 0; part < 2; ++part) {
        typename S::Int word[4];
        S::load_words(codes + 16 * part, stride, word);
        for (std::size_t d = 0; d < 4; ++d) {
            for (unsigned i = 0; i < 4; ++i) {
                decoder.put(16 * part + 4 * d + i, S::add(S::from_byte(word[d], i), S::set1(-128.0f)));
            }
        }
    }
}

template <class S>
typename S::Table table_of(irq_codebook codebook) {
    static const float *const levels[] = {irq_nf4_levels,  irq_nf3_levels,  irq_nf2_levels, irq_int4_levels,
                                          irq_int3_levels, irq_int2_levels, nullptr};
    float table[16] = {};
    const std::size_t count = std::size_t{1} << irq_codebook_bits[codebook];
    for (std::size_t i = 0; i < 16 && count <= 16; ++i) table[i] = levels[codebook][i % count];
    return S::table(table);
}

// Columns [k0, k0 + columns) of rows [row, row + rows); rows behind the last repeat it.
template <class S>
void decode_panel(const Matrix &w, const typename S::Table &table, std::size_t row, std::size_t rows, std::size_t k0,
                  std::size_t columns, Panel<S> *panel) {
    const std::size_t b = w.block_size, nb = w.blocks_per_row(), blocks = columns / b, stride = w.row_bytes();
    const std::size_t block_bytes = stride / nb, at = row * nb + k0 / b;
    load_values<S>(w.scale, at, nb, rows, blocks, panel->scale);
    load_values<S>(w.tau, at, nb, rows, blocks, panel->tau);
    for (std::size_t half = 0; half < 2; ++half) {
        const std::size_t lane = half * S::width;
        const std::uint8_t *codes = static_cast<const std::uint8_t *>(w.data) + at * block_bytes;
        alignas(64) std::uint8_t last[S::width * chunk_columns];  // rows that are not all there
        std::size_t codes_stride = stride;
        if (lane + S::width <= rows) {
            codes += lane * stride;
        } else {
            codes_stride = blocks * block_bytes;
            for (std::size_t r = 0; r < S::width; ++r) {
                std::memcpy(last + r * codes_stride, codes + std::min(lane + r, rows - 1) * stride, codes_stride);
            }
            codes = last;
        }
        for (std::size_t i = 0; i < blocks; ++i, codes += block_bytes) {
            const Decoder<S> decoder{S::load(&panel->scale[i][lane]), S::load(&panel->tau[i][lane]),
                                     &panel->weight[i * b][lane]};
            switch (w.codebook) {
                case IRQ_NF4: decode_4bit<S, true>(codes, codes_stride, b, table, decoder); break;
                case IRQ_INT4: decode_4bit<S, false>(codes, codes_stride, b, table, decoder); break;
                case IRQ_INT8: decode_8bit<S>(codes, codes_stride, decoder); break;
                case IRQ_NF3:
                case IRQ_INT3: decode_2bit<S, true>(codes, codes_stride, table, decoder); break;
                default: decode_2bit<S, false>(codes, codes_stride, table, decoder); break;
            }
        }
    }
}

// Asks for what the panel to the right will read: pieces of rows, which no hardware foresees.
template <class S>
void prefetch_panel(const Matrix &w, std::size_t row, std::size_t rows, std::size_t k0) {
    if (k0 >= w.columns) return;
    const std::size_t stride = w.row_bytes(), bytes = stride * std::min(chunk_columns, w.columns - k0) / w.columns;
    const std::size_t nb = w.blocks_per_row(), block = k0 / w.block_size;
    const std::size_t value_bytes = w.scale.storage == Storage::f16 ? 2 : 4;
    const auto address = [](const void *base, std::size_t at) { return static_cast<const std::uint8_t *>(base) + at; };
    for (std::size_t r = row; r < row + rows; ++r) {
        const std::size_t first = r * stride + block * (stride / nb);
        for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(address(w.data, first + i));
        __builtin_prefetch(address(w.scale.values, value_bytes * (r * nb + block)));
        if (w.tau.values != nullptr) __builtin_prefetch(address(w.tau.values, value_bytes * (r * nb + block)));
    }
}

// --- the product of a panel and a tile of T tokens ---

template <class S, std::size_t T>
void multiply_tile(const Panel<S> &panel, const float *a, std::size_t columns, bool add, float *y, std::size_t ldy) {
    using Vec = typename S::Vec;
    Vec sum[T][2];
    for (std::size_t t = 0; t < T; ++t) {
        __builtin_prefetch(y + t * ldy, 1);  // rows of y lie far apart: most are in no near cache
        __builtin_prefetch(y + t * ldy + S::width, 1);
        sum[t][0] = sum[t][1] = S::zero();
    }
    for (std::size_t i = 0; i < columns; ++i, a += T) {
        __builtin_prefetch(a + inputs_ahead);
        const Vec w0 = S::load(panel.weight[i]), w1 = S::load(panel.weight[i] + S::width);
        for (std::size_t t = 0; t < T; ++t) {
            const Vec x = S::set1(a[t]);
            sum[t][0] = S::fma(x, w0, sum[t][0]);
            sum[t][1] = S::fma(x, w1, sum[t][1]);
        }
    }
    for (std::size_t t = 0; t < T; ++t) {
        for (std::size_t v = 0; v < 2; ++v) {
            float *out = y + t * ldy + v * S::width;
            S::store(out, add ? S::add(S::load(out), sum[t][v]) : sum[t][v]);
        }
    }
}

template <class S, std::size_t T>
void multiply_some(std::size_t tokens, const Panel<S> &panel, const float *a, std::size_t columns, bool add, float *y,
                   std::size_t ldy) {
    if (tokens == T) return multiply_tile<S, T>(panel, a, columns, add, y, ldy);
    if constexpr (T > 1) multiply_some<S, T - 1>(tokens, panel, a, columns, add, y, ldy);
}

// A tile of which only `rows` rows exist: through a buffer.
template <class S>
void multiply_edge(std::size_t tokens, std::size_t rows, const Panel<S> &panel, const float *a, std::size_t columns,
                   bool add, float *y, std::size_t ldy) {
    constexpr std::size_t width = Panel<S>::rows;
    alignas(64) float buffer[S::tile_tokens][width] = {};
    for (std::size_t t = 0; add && t < tokens; ++t) std::memcpy(buffer[t], y + t * ldy, rows * sizeof(float));
    multiply_some<S, S::tile_tokens>(tokens, panel, a, columns, add, buffer[0], width);
    for (std::size_t t = 0; t < tokens; ++t) std::memcpy(y + t * ldy, buffer[t], rows * sizeof(float));
}

template <class S>
void multiply(const Matrix &w, const float *packed, std::size_t tokens, std::size_t r0, std::size_t r1, float *y,
              std::size_t ldy) {
    Panel<S> panel;
    const auto table = table_of<S>(w.codebook);
    const std::size_t tiles = (tokens + S::tile_tokens - 1) / S::tile_tokens;
    for (std::size_t k0 = 0; k0 < w.columns; k0 += chunk_columns) {
        const std::size_t columns = std::min(chunk_columns, w.columns - k0);
        for (std::size_t row = r0; row < r1; row += panel.rows) {
            const std::size_t rows = std::min(panel.rows, r1 - row);
            decode_panel<S>(w, table, row, rows, k0, columns, &panel);
            prefetch_panel<S>(w, row, rows, k0 + columns);
            for (std::size_t tile = 0; tile < tiles; ++tile) {
                const auto [begin, end] = tile_range(tokens, tiles, tile);
                const float *a = packed + k0 * tokens + columns * begin;
                float *out = y + begin * ldy + row;
                if (rows == panel.rows) {
                    multiply_some<S, S::tile_tokens>(end - begin, panel, a, columns, k0 != 0, out, ldy);
                } else {
                    multiply_edge<S>(end - begin, rows, panel, a, columns, k0 != 0, out, ldy);
                }
            }
        }
    }
}

}  // namespace
}  // namespace irq::onnx
