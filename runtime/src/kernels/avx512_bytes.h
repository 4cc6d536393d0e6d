// Fast mode on AVX-512 VNNI: vpdpbusd multiplies unsigned 8-bit codes of weights by signed 8-bit codes of inputs and
// adds four. Inputs of gemv are scale * (high + low / 256), a scale for every 64 columns: the second product of the
// same unpacked weights takes the rounding of the inputs away. Those of gemm are scale * code, a scale for every 32.
//
// Codes of weights count from 128 below level 0, so 128 times the inputs is taken off what comes out: the rounding
// of an input meets a level and not its distance from the lowest one. The residual offset of a table is 0 for the
// integer codebooks and a thousandth for the others, small enough to join tau.
#pragma once

#include "avx512_ops.h"
#include "simd_gemv.h"

namespace irq {
namespace {

inline float largest_of(const __m512 *v, std::size_t n) {
    __m512 largest = _mm512_abs_ps(v[0]);
    for (std::size_t i = 1; i < n; ++i) largest = _mm512_max_ps(largest, _mm512_abs_ps(v[i]));
    return _mm512_reduce_max_ps(largest);
}

inline void store128(std::int8_t *to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i *>(to), v); }

// -128 times the sums of the bytes of both groups of a span.
inline void start_sums(const std::int8_t *bytes, std::int32_t out[2]) {
    const __m512i unsigned_128 = _mm512_set1_epi8(-128);
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), unsigned_128, _mm512_loadu_si512(bytes));
    out[0] = -_mm512_mask_reduce_add_epi32(0x00ff, sums);
    out[1] = -_mm512_mask_reduce_add_epi32(0xff00, sums);
}

// The span's 64 high codes, then its 64 low ones; and both in halves beside those of the span it is paired with.
inline void prepare_for_gemv(const __m512 v[4], std::size_t s, const TokenInput &out) {
    const float top = largest_of(v, 4);
    const __m512 rate = _mm512_set1_ps(code_rate(top, largest_byte));
    std::int8_t *bytes = out.bytes + s * (2 * span_size), *pair = out.pairs + s / 2 * (4 * span_size) + s % 2 * 32;
    for (std::size_t i = 0; i < 4; ++i) {
        const __m512 value = _mm512_mul_ps(v[i], rate);
        const __m512i high = _mm512_cvtps_epi32(value);
        const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_cvtepi32_ps(high)), _mm512_set1_ps(low_terms));
        const __m128i high_codes = _mm512_cvtepi32_epi8(high);
        const __m128i low_codes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(rest));  // 128 becomes 127
        store128(bytes + 16 * i, high_codes);
        store128(bytes + 16 * i + span_size, low_codes);
        store128(pair + i / 2 * span_size + i % 2 * 16, high_codes);
        store128(pair + i / 2 * span_size + i % 2 * 16 + 2 * span_size, low_codes);
    }
    std::int32_t low[2];
    start_sums(bytes, out.start + 2 * s);
    start_sums(bytes + span_size, low);
    for (std::size_t g = 0; g < 2; ++g) out.start[2 * s + g] = out.start[2 * s + g] * 256 + low[g];
    out.span_start[s] = out.start[2 * s] + out.start[2 * s + 1];
    out.scale[s] = top / largest_byte;
}

inline void prepare_for_gemm(const __m512 v[4], std::size_t s, const TokenInput &out) {
    std::int8_t *bytes = out.bytes + s * span_size;
    for (std::size_t g = 0; g < 2; ++g) {
        const float top = largest_of(v + 2 * g, 2);
        const __m512 rate = _mm512_set1_ps(code_rate(top, largest_byte));
        for (std::size_t i = 2 * g; i < 2 * g + 2; ++i) {
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], rate));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(bytes + 16 * i), _mm512_cvtepi32_epi8(code));
        }
        out.scale[2 * s + g] = top / largest_byte;
    }
    start_sums(bytes, out.start + 2 * s);
}

inline void prepare_bytes(const float *x, std::size_t columns, std::size_t stride, bool for_gemv, const TokenInput &out) {
    std::memcpy(out.x, x, columns * sizeof(float));
    for (std::size_t i = columns; i < stride; ++i) out.x[i] = 0.0f;
    for (std::size_t s = 0; s < stride / span_size; ++s) {
        __m512 v[4];
        for (std::size_t i = 0; i < 4; ++i) v[i] = _mm512_loadu_ps(out.x + s * span_size + 16 * i);
        out.sum[2 * s] = _mm512_reduce_add_ps(_mm512_add_ps(v[0], v[1]));
        out.sum[2 * s + 1] = _mm512_reduce_add_ps(_mm512_add_ps(v[2], v[3]));
        out.span_sum[s] = out.sum[2 * s] + out.sum[2 * s + 1];
        if (out.codes == nullptr) continue;
        if (!std::isfinite(out.span_sum[s])) mark_not_finite_bytes(out, for_gemv, s);
        else if (for_gemv) prepare_for_gemv(v, s, out);
        else prepare_for_gemm(v, s, out);
    }
}

// Columns go 64 at a time, one block or two; where 64 bytes are two whole blocks, 128.
template <class S, class L>
class ByteDot {
  public:
    static constexpr std::size_t rows_at_once = 4, bytes_ahead = 2 * codes_ahead;

    ByteDot(const Matrix &w, const TokenInput &x, std::size_t column, std::size_t n, std::size_t ahead)
        : n_(n), ahead_(ahead), in_((goes_in_pairs ? x.pairs : x.bytes) + 2 * column),
          start_(block_starts<L>(x) + column / L::block), in_scale_(x.scale + column / span_size),
          sum_(block_sums<L>(x) + column / L::block),
          codes_(S::template codes<L>(byte_table_of(w), byte_bias - byte_table_of(w).bias)),
          step_(_mm512_set1_ps(byte_table_of(w).step / low_terms)), offset_(_mm512_set1_ps(residual_offset(byte_table_of(w)))) {}

    void operator()(const Rows<rows_at_once> &rows, __m512 total[rows_at_once]) const {
        alignas(64) float both[R][max_blocks + slack];  // scales of weights and inputs, multiplied
        __m512 sums[R];
        for (__m512 &sum : sums) sum = S::zero();
        for (std::size_t b = 0; b < n_; b += S::width) {
            const __mmask16 some = S::first(n_ - b);
            const __m512 in_scale = input_scales(in_scale_ + b / per_step);
            const __m512 start = _mm512_cvtepi32_ps(_mm512_loadu_si512(start_ + b)), sum = S::load(sum_ + b);
            for (std::size_t r = 0; r < R; ++r) {
                const __m512 scale = S::load(rows.scale[r] + b), product = _mm512_mul_ps(scale, in_scale);
                const __m512 tau = L::adds_tau ? S::load(rows.tau[r] + b) : S::zero();
                total[r] = _mm512_mask3_fmadd_ps(_mm512_fmadd_ps(scale, offset_, tau), sum, total[r], some);
                sums[r] = _mm512_mask3_fmadd_ps(product, start, sums[r], some);
                S::store(both[r] + b, product);
            }
        }
        if constexpr (goes_in_pairs) add_pairs(rows, both, sums);
        else add_spans(rows, both, sums);
        for (std::size_t r = 0; r < R; ++r) total[r] = _mm512_fmadd_ps(sums[r], step_, total[r]);
    }

  private:
    static constexpr std::size_t R = rows_at_once, per_step = span_size / L::block;
    static constexpr bool goes_in_pairs = L::bits == 4 && L::block == 64;

    using Scales = const float[R][max_blocks + slack];

    // 64 bytes of codes: low nibbles are the first halves of two blocks, high ones the second.
    void add_pairs(const Rows<R> &rows, Scales &both, __m512 sums[R]) const {
        std::size_t b = 0;
        for (; b + 2 <= n_; b += 2) {
            const PairInput in(in_ + b * (2 * L::block));
#pragma GCC unroll 4
            for (std::size_t r = 0; r < R; ++r) {
                prefetch(rows.codes[0] + (R * b + 2 * r) * L::stride, ahead_, 2 * L::stride);
                const __m512 part = product(_mm512_loadu_si512(rows.codes[r] + b * L::stride), in);
                sums[r] = _mm512_fmadd_ps(part, S::halves(both[r] + b), sums[r]);
            }
        }
        if (b == n_) return;
        const PairInput in(in_ + b * (2 * L::block));
        for (std::size_t r = 0; r < R; ++r) {
            const __m512 part = product(_mm512_maskz_loadu_epi32(0x00ff, rows.codes[r] + b * L::stride), in);
            sums[r] = _mm512_mask3_fmadd_ps(part, _mm512_set1_ps(both[r][b]), sums[r], 0x00ff);
        }
    }

    void add_spans(const Rows<R> &rows, Scales &both, __m512 sums[R]) const {
        std::size_t b = 0;
#pragma GCC unroll 2
        for (; b + per_step <= n_; b += per_step) {
            prefetch(rows.codes[0] + R * b * L::stride, ahead_, R * per_step * L::stride);
            for (std::size_t r = 0; r < R; ++r) {
                const __m512 part = product(rows.codes[r] + b * L::stride, in_ + b * (2 * L::block));
                sums[r] = _mm512_fmadd_ps(part, scale_of(both[r] + b), sums[r]);
            }
        }
        for (std::size_t r = 0; b < n_ && r < R; ++r) {
            std::uint8_t last[2 * L::stride] = {};  // a block of zeros behind the last one
            std::memcpy(last, rows.codes[r] + b * L::stride, L::stride - L::lead);
            const __m512 part = product(last, in_ + b * (2 * L::block));
            sums[r] = _mm512_mask3_fmadd_ps(part, _mm512_set1_ps(both[r][b]), sums[r], 0x00ff);
        }
    }

    // Of the next 16 blocks; p has one for every 64 columns.
    static __m512 input_scales(const float *p) {
        const __m512 spans = S::load(p);
        if constexpr (per_step == 1) return spans;
        return _mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), spans);
    }

    struct PairInput {
        __m512i high[2], low[2];  // of first and second halves

        explicit PairInput(const std::int8_t *p)
            : high{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)},
              low{_mm512_loadu_si512(p + 128), _mm512_loadu_si512(p + 192)} {}
    };

    __m512 product(__m512i codes, const PairInput &in) const {
        const __m512i first = _mm512_permutexvar_epi8(codes, codes_.low);
        const __m512i second = _mm512_permutexvar_epi8(_mm512_srli_epi64(codes, 4), codes_.low);
        __m512i part = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, in.high[0]);
        part = _mm512_slli_epi32(_mm512_dpbusd_epi32(part, second, in.high[1]), 8);
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(part, first, in.low[0]), second, in.low[1]));
    }

    __m512 product(const std::uint8_t *p, const std::int8_t *in) const {
        const __m512i weight = S::template unpack<L>(p, codes_);
        const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weight, _mm512_loadu_si512(in));
        const __m512i low = _mm512_loadu_si512(in + span_size);
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), weight, low));
    }

    static __m512 scale_of(const float *scale) {
        if constexpr (per_step == 1) return _mm512_set1_ps(*scale);
        else return S::halves(scale);
    }

    std::size_t n_, ahead_;
    const std::int8_t *in_;
    const std::int32_t *start_;
    const float *in_scale_, *sum_;
    typename S::Codes codes_;
    __m512 step_, offset_;
};

}  // namespace
}  // namespace irq
