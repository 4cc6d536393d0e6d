// Compiled with the flags of CMakeLists.txt; runs only where irq::active_isa() says so.
#include <immintrin.h>

#include <algorithm>

#include "../kernels/avx512_ops.h"
#include "../kernels/simd_scales.h"
#include "row_gemv.h"

namespace irq::onnx {
namespace {

using Vec = __m512;
using Int = __m512i;

constexpr std::size_t width = 16;
constexpr std::size_t step_columns = 128, step_bytes = 64;  // one vector of codes
constexpr std::size_t rows_at_once = 4;                     // they share the loads of x
// One line of every page is asked for so early that its address is known when the others are: a mapped model has more
// pages than a processor remembers.
constexpr std::size_t page_bytes = 4096, pages_ahead = 32 * page_bytes;

constexpr std::int32_t lane_numbers[width] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The first n (any number) of 16 lanes.
__mmask16 first(std::size_t n) { return static_cast<__mmask16>(n < width ? (1u << n) - 1 : 0xffffu); }

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

Vec load(const float *p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
Vec load(const std::uint16_t *p, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }

const float *nibble_levels(const Matrix &w) { return w.codebook == IRQ_NF4 ? irq_nf4_levels : irq_int4_levels; }

std::size_t padded_columns(const Matrix &w) { return round_up(w.columns, step_columns); }

// From rows to those whose codes are asked for: about 8 KiB.
std::size_t rows_ahead(const Matrix &w) {
    return rows_at_once * std::max<std::size_t>(1, 8192 / (rows_at_once * w.columns / 2));
}

std::size_t size(const Matrix &w) { return padded_columns(w) + round_up(w.blocks_per_row(), width); }

// Lane d of vector i: element 8 d + (i ^ flip) of 128.
void store_every_eighth(const Vec in[8], std::size_t flip, float *out) {
    const Int from = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    for (const std::size_t half : {0, 4}) {
        const Int at = _mm512_add_epi32(from, _mm512_set1_epi32(static_cast<int>(half)));
        Vec quarter[4];  // [vector half + 0, 1, 2, 3] [four lanes]
        for (std::size_t i = 0; i < 4; ++i) quarter[i] = _mm512_permutex2var_ps(in[2 * i], at, in[2 * i + 1]);
        const Vec a = _mm512_shuffle_f32x4(quarter[0], quarter[1], 0x44);
        const Vec b = _mm512_shuffle_f32x4(quarter[2], quarter[3], 0x44);
        const Vec c = _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xee);
        const Vec d = _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xee);
        _mm512_storeu_ps(out + (half + (0 ^ flip)) * width, _mm512_shuffle_f32x4(a, b, 0x88));
        _mm512_storeu_ps(out + (half + (1 ^ flip)) * width, _mm512_shuffle_f32x4(a, b, 0xdd));
        _mm512_storeu_ps(out + (half + (2 ^ flip)) * width, _mm512_shuffle_f32x4(c, d, 0x88));
        _mm512_storeu_ps(out + (half + (3 ^ flip)) * width, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
}

// The row that is read first is asked for meanwhile.
template <class T>
void prepare_from(const Matrix &w, const T *x, std::size_t row, float *ordered) {
    const std::size_t columns = w.columns, flip = w.codebook == IRQ_NF4 ? 1 : 0, bytes = rows_ahead(w) * step_bytes;
    std::size_t soon = row * columns / 2;
    float *sum = ordered + padded_columns(w);
    std::fill(sum, ordered + size(w), 0.0f);
    for (std::size_t b = 0; b < w.blocks_per_row(); ++b) {
        const T *block = x + b * w.block_size;
        Vec total = _mm512_add_ps(load(block, 0xffff), load(block + width, 0xffff));
        for (std::size_t i = 2 * width; i < w.block_size; i += width) {
            total = _mm512_add_ps(total, load(block + i, 0xffff));
        }
        sum[b] = _mm512_reduce_add_ps(total);
    }
    for (std::size_t c = 0; c < columns; c += step_columns, ordered += step_columns, soon += bytes) {
        prefetch(w.data, soon, bytes);
        Vec in[8];
        for (std::size_t i = 0; i < 8; ++i) {
            const std::size_t at = c + i * width;
            in[i] = at < columns ? load(x + at, first(columns - at)) : _mm512_setzero_ps();
        }
        store_every_eighth(in, flip, ordered);
    }
}

void prepare(const Matrix &w, const void *x, bool is_half, std::size_t row, float *prepared) {
    if (is_half) prepare_from(w, static_cast<const std::uint16_t *>(x), row, prepared);
    else prepare_from(w, static_cast<const float *>(x), row, prepared);
}

// index[i]: nibble i of every word in the low bits, anything above.
[[gnu::always_inline]] inline void nibbles(Int codes, Int index[8]) {
    index[0] = codes;
    index[4] = _mm512_srli_epi32(codes, 16);
    for (const std::size_t half : {0, 4}) {
        index[half + 1] = _mm512_srli_epi16(index[half], 4);
        index[half + 2] = _mm512_srli_epi16(index[half], 8);
        index[half + 3] = _mm512_srli_epi16(index[half], 12);
    }
}

// The levels of 128 codes times x, summed in each lane; a lane is part of one block. A call would put x in memory.
[[gnu::always_inline]] inline Vec product(Int codes, Vec table, const Vec x[8]) {
    Int index[8];
    nibbles(codes, index);
    const auto level = [&](std::size_t i) { return _mm512_permutexvar_ps(index[i], table); };
    Vec even = _mm512_mul_ps(level(0), x[0]), odd = _mm512_mul_ps(level(1), x[1]);
    for (std::size_t i = 2; i < 8; i += 2) {
        even = _mm512_fmadd_ps(level(i), x[i], even);
        odd = _mm512_fmadd_ps(level(i + 1), x[i + 1], odd);
    }
    return _mm512_add_ps(even, odd);
}

// What ScaleWindow asks of a layout.
struct Blocks {
    static constexpr int lead = 0, stride = 0;
    static constexpr bool adds_tau = true;
};
using Values = ScaleWindow<Avx512, Blocks>;
static_assert(most_blocks_of_a_row <= rows_at_once * max_blocks);  // what a window holds

// What R rows' taus add to their sums. Its own loop, because the other one needs every register.
template <std::size_t R>
[[gnu::always_inline]] inline void add_taus(const float *tau, std::size_t nb, const float *sum, Vec total[R]) {
    for (std::size_t b = 0; b < nb; b += width) {
        const Vec in_sum = _mm512_loadu_ps(sum + b);
        for (std::size_t i = 0; i < R; ++i) {
            total[i] = _mm512_fmadd_ps(load(tau + i * nb + b, first(nb - b)), in_sum, total[i]);
        }
    }
}

// R rows from row r on, which are followed by those from row `soon` on.
template <std::size_t R, std::size_t block>
[[gnu::always_inline]] inline void multiply_rows(const Matrix &w, Values *values, const float *x, std::size_t r,
                                                 std::size_t soon, float *y) {
    const std::size_t nb = w.columns / block, bytes = w.columns / 2, ahead = (soon - r) * bytes;
    const std::uint8_t *codes = static_cast<const std::uint8_t *>(w.data) + r * bytes;
    for (std::size_t i = 0; i < R * bytes; i += page_bytes) prefetch(codes, pages_ahead + i, 1);
    values->reach(r * nb, R * nb);
    const float *scale = values->scale(r * nb);
    const Vec table = _mm512_loadu_ps(nibble_levels(w));
    const Int first_blocks = _mm512_srli_epi32(_mm512_loadu_si512(lane_numbers), block == 64 ? 3 : 2);
    Vec total[R];
    for (Vec &v : total) v = _mm512_setzero_ps();
    if (w.tau.storage != Storage::none) add_taus<R>(values->tau(r * nb), nb, x + padded_columns(w), total);
    for (std::size_t b = 0; b < nb; b += width) {  // a vector of scales
        Vec scales[R];
        for (std::size_t i = 0; i < R; ++i) scales[i] = load(scale + i * nb + b, first(nb - b));
        Int block_of_lane = first_blocks;
        const auto step = [&](std::size_t at, auto load_codes) __attribute__((always_inline)) {  // at: bytes into a row
            Vec in[8];
            for (std::size_t i = 0; i < 8; ++i) in[i] = _mm512_loadu_ps(x + 2 * at + i * width);
            for (std::size_t i = 0; i < R; ++i) {
                prefetch(codes + R * at + i * step_bytes, ahead, step_bytes);  // the rows are one stretch of memory
                const Vec part = product(load_codes(codes + i * bytes + at), table, in);
                total[i] = _mm512_fmadd_ps(part, _mm512_permutexvar_ps(block_of_lane, scales[i]), total[i]);
            }
            block_of_lane = _mm512_add_epi32(block_of_lane, _mm512_set1_epi32(step_columns / block));
        };
        std::size_t at = b * block / 2;
        const std::size_t end = std::min(at + width * block / 2, bytes);
        for (; at + step_bytes <= end; at += step_bytes) {
            step(at, [](const std::uint8_t *p) { return _mm512_loadu_si512(p); });
        }
        if (at == end) continue;
        const __mmask16 words = first((end - at) / 4);
        step(at, [words](const std::uint8_t *p) { return _mm512_maskz_loadu_epi32(words, p); });
    }
    for (std::size_t i = 0; i < R; ++i) y[r + i] = _mm512_reduce_add_ps(total[i]);
}

template <std::size_t block>
void multiply_rows_of(const Matrix &w, const void *x, bool is_half, float *prepared, RowQueue *queue, float *y) {
    const std::size_t nb = w.columns / block, ahead = rows_ahead(w);
    const std::size_t at_once = nb <= max_blocks ? rows_at_once : 1;
    Values values(w, at_once * nb);
    Rows rows = queue->take(), next = rows;
    if (rows.is_empty()) return;
    values.prefetch_from(rows.begin * nb);
    prepare(w, x, is_half, rows.begin, prepared);
    // The row that is asked for while row r is read.
    const auto soon = [&](std::size_t r) {
        if (r + ahead < rows.end) return r + ahead;
        if (next.begin == rows.begin) {
            next = queue->take();
            values.prefetch_from(next.begin * nb);
        }
        return next.begin + (r + ahead - rows.end);
    };
    for (; !rows.is_empty(); rows = next) {
        std::size_t r = rows.begin;
        for (; at_once == rows_at_once && r + rows_at_once <= rows.end; r += rows_at_once) {
            multiply_rows<rows_at_once, block>(w, &values, prepared, r, soon(r), y);
        }
        for (; r < rows.end; ++r) multiply_rows<1, block>(w, &values, prepared, r, soon(r), y);
    }
}

void multiply(const Matrix &w, const void *x, bool is_half, float *prepared, RowQueue *queue, float *y) {
    const auto rows_of = w.block_size == 64 ? multiply_rows_of<64> : multiply_rows_of<32>;
    rows_of(w, x, is_half, prepared, queue, y);
}

}  // namespace

const RowGemv row_gemv_avx512 = {size, multiply};

}  // namespace irq::onnx
