// Compiled with the flags of CMakeLists.txt; runs only where irq::active_isa() says so.
#include <immintrin.h>

#include <algorithm>

#include "row_gemv.h"

namespace irq::onnx {
namespace {

using Vec = __m512;
using Int = __m512i;

constexpr std::size_t width = 16;
constexpr std::size_t step_columns = 128, step_bytes = 64;  // one vector of codes
constexpr std::size_t rows_at_once = 4;                     // they share the loads of x
constexpr std::size_t least_ahead = 12288;                  // bytes; hardware prefetchers stop at page borders

constexpr std::int32_t lane_numbers[width] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The first n (any number) of 16 lanes.
__mmask16 first(std::size_t n) { return static_cast<__mmask16>(n < width ? (1u << n) - 1 : 0xffffu); }

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// Inlined by force: GCC takes a function that only prefetches for one without effects. May lie outside of any array.
[[gnu::always_inline]] inline void prefetch(const void *address, std::size_t ahead) {
    __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<std::uintptr_t>(address) + ahead));
}

Vec load(const float *p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
Vec load(const std::uint16_t *p, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }

const float *levels_of(const Matrix &w) { return w.codebook == IRQ_NF4 ? irq_nf4_levels : irq_int4_levels; }

std::size_t padded_columns(const Matrix &w) { return round_up(w.columns, step_columns); }

// From codes to those to ask memory for.
std::size_t bytes_ahead(const Matrix &w) { return std::max(least_ahead, rows_at_once * w.columns / 2); }

std::size_t size(const Matrix &w) { return padded_columns(w) + round_up(w.blocks_per_row(), width); }

template <class T>
void prepare_from(const Matrix &w, const T *x, float *ordered) {
    const std::size_t columns = w.columns, flip = w.codebook == IRQ_NF4 ? 1 : 0;
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
    alignas(64) float step[step_columns];
    const Int eighth = _mm512_slli_epi32(_mm512_loadu_si512(lane_numbers), 3);
    for (std::size_t c = 0; c < columns; c += step_columns) {
        for (std::size_t i = 0; i < step_columns; i += width) {
            const std::size_t left = columns > c + i ? columns - c - i : 0;
            _mm512_store_ps(step + i, left == 0 ? _mm512_setzero_ps() : load(x + c + i, first(left)));
        }
        for (std::size_t i = 0; i < 8; ++i, ordered += width) {
            _mm512_storeu_ps(ordered, _mm512_i32gather_ps(eighth, step + (i ^ flip), sizeof(float)));
        }
    }
}

void prepare(const Matrix &w, const void *x, bool is_half, float *prepared) {
    if (is_half) prepare_from(w, static_cast<const std::uint16_t *>(x), prepared);
    else prepare_from(w, static_cast<const float *>(x), prepared);
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

// What R rows' taus add to their sums. Its own loop, because the other one needs every register.
template <std::size_t R, class T>
[[gnu::always_inline]] inline void add_taus(const T *tau, std::size_t nb, const float *sum, std::size_t ahead,
                                            Vec total[R]) {
    for (std::size_t b = 0; b < nb; b += width) {
        const Vec in_sum = _mm512_loadu_ps(sum + b);
        for (std::size_t i = 0; i < R; ++i) {
            prefetch(tau + R * b + i * width, ahead);
            total[i] = _mm512_fmadd_ps(load(tau + i * nb + b, first(nb - b)), in_sum, total[i]);
        }
    }
}

// R rows from row r on. T: float or fp16 bits, the type of scale and tau.
template <std::size_t R, std::size_t block, class T>
[[gnu::always_inline]] inline void multiply_rows(const Matrix &w, const float *x, std::size_t r, float *y) {
    const std::size_t nb = w.columns / block, bytes = w.columns / 2;
    const std::size_t ahead = bytes_ahead(w), values_ahead = ahead / (block / 2) * sizeof(T);
    const std::uint8_t *codes = static_cast<const std::uint8_t *>(w.data) + r * bytes;
    const T *scale = static_cast<const T *>(w.scale.values) + r * nb;
    const Vec table = _mm512_loadu_ps(levels_of(w));
    const Int first_blocks = _mm512_srli_epi32(_mm512_loadu_si512(lane_numbers), block == 64 ? 3 : 2);
    Vec total[R];
    for (Vec &v : total) v = _mm512_setzero_ps();
    if (w.tau.storage != Storage::none) {
        const T *tau = static_cast<const T *>(w.tau.values) + r * nb;
        add_taus<R>(tau, nb, x + padded_columns(w), values_ahead, total);
    }
    for (std::size_t b = 0; b < nb; b += width) {  // a vector of scales
        Vec scales[R];
        for (std::size_t i = 0; i < R; ++i) {
            scales[i] = load(scale + i * nb + b, first(nb - b));
            prefetch(scale + R * b + i * width, values_ahead);
        }
        Int block_of_lane = first_blocks;
        const auto step = [&](std::size_t at, auto load_codes) __attribute__((always_inline)) {  // at: bytes into a row
            Vec in[8];
            for (std::size_t i = 0; i < 8; ++i) in[i] = _mm512_loadu_ps(x + 2 * at + i * width);
            for (std::size_t i = 0; i < R; ++i) {
                prefetch(codes + R * at + i * step_bytes, ahead);  // the rows are one stretch of memory
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

// What the first rows read, which no row before them asks for.
template <std::size_t block, class T>
[[gnu::always_inline]] inline void prefetch_start(const Matrix &w, std::size_t r0, std::size_t r1) {
    const std::size_t nb = w.columns / block, ahead = std::min(bytes_ahead(w), (r1 - r0) * w.columns / 2);
    const std::size_t values = r0 * nb * sizeof(T), values_ahead = ahead / (block / 2) * sizeof(T);
    for (const BlockValues *v : {&w.tau, &w.scale}) {
        if (v->storage == Storage::none) continue;
        for (std::size_t i = 0; i < values_ahead; i += 64) prefetch(v->values, values + i);
    }
    for (std::size_t i = 0; i < ahead; i += 64) prefetch(w.data, r0 * w.columns / 2 + i);
}

template <std::size_t block, class T>
void multiply_range(const Matrix &w, const float *prepared, std::size_t r0, std::size_t r1, float *y) {
    prefetch_start<block, T>(w, r0, r1);
    for (; r0 + rows_at_once <= r1; r0 += rows_at_once) multiply_rows<rows_at_once, block, T>(w, prepared, r0, y);
    for (; r0 < r1; ++r0) multiply_rows<1, block, T>(w, prepared, r0, y);
}

void multiply(const Matrix &w, const float *prepared, std::size_t r0, std::size_t r1, float *y) {
    const bool is_half = w.scale.storage == Storage::f16, is_wide = w.block_size == 64;
    const auto range = is_half ? is_wide ? multiply_range<64, std::uint16_t> : multiply_range<32, std::uint16_t>
                               : is_wide ? multiply_range<64, float> : multiply_range<32, float>;
    range(w, prepared, r0, r1, y);
}

}  // namespace

const RowGemv row_gemv_avx512 = {size, prepare, multiply};

}  // namespace irq::onnx
