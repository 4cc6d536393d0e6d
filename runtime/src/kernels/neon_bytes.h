// Fast mode on AArch64 with the dot-product extension: sdot multiplies signed 8-bit codes of weights by signed 8-bit
// codes of inputs and adds four. Inputs of gemv are scale * (high + low / 256), a scale for every 64 columns; those of
// gemm scale * code, a scale for every 32: as on AVX-512. Weights are signed too, which spares sdot what vpdpbusd needs
// afterwards: codes count from the one nearest to level 0, and nothing is taken off the sums. The residual offset of a
// table, 0 for the integer codebooks and a thousandth for the others, joins tau.
#pragma once

#include "neon_ops.h"
#include "simd_gemv.h"

namespace irq {
namespace {

// Rows of four become columns.
inline void transpose(int32x4_t v[4]) {
    const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(v[0], v[1]));
    const int64x2_t b = vreinterpretq_s64_s32(vtrn2q_s32(v[0], v[1]));
    const int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(v[2], v[3]));
    const int64x2_t d = vreinterpretq_s64_s32(vtrn2q_s32(v[2], v[3]));
    v[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
    v[1] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
    v[2] = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
    v[3] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
}

// Of 16 integers; those beyond a byte become its ends.
inline int8x16_t bytes_of(const int32x4_t v[4]) {
    const int16x8_t first = vqmovn_high_s32(vqmovn_s32(v[0]), v[1]), last = vqmovn_high_s32(vqmovn_s32(v[2]), v[3]);
    return vqmovn_high_s16(vqmovn_s16(first), last);
}

// The codes of n columns that share a scale, which it returns; low ones too, unless `low` is null.
inline float round_to_bytes(const float *x, std::size_t n, std::int8_t *high, std::int8_t *low) {
    float32x4_t largest = vdupq_n_f32(0.0f);
    for (std::size_t i = 0; i < n; i += 4) largest = vmaxq_f32(largest, vabsq_f32(vld1q_f32(x + i)));
    const float top = vmaxvq_f32(largest), rate = code_rate(top, largest_byte);
    for (std::size_t i = 0; i < n; i += 16) {
        int32x4_t code[4], rest[4];
        for (std::size_t k = 0; k < 4; ++k) {
            const float32x4_t value = vmulq_n_f32(vld1q_f32(x + i + 4 * k), rate);
            code[k] = vcvtnq_s32_f32(value);
            rest[k] = vcvtnq_s32_f32(vmulq_n_f32(vsubq_f32(value, vcvtq_f32_s32(code[k])), low_terms));
        }
        vst1q_s8(high + i, bytes_of(code));
        if (low != nullptr) vst1q_s8(low + i, bytes_of(rest));  // 128 becomes 127
    }
    return top / largest_byte;
}

inline void prepare_bytes(const float *x, std::size_t columns, std::size_t stride, bool for_gemv,
                          const TokenInput &out) {
    std::memcpy(out.x, x, columns * sizeof(float));
    for (std::size_t i = columns; i < stride; ++i) out.x[i] = 0.0f;
    for (std::size_t s = 0; s < stride / span_size; ++s) {
        const float *span = out.x + s * span_size;
        for (std::size_t g = 0; g < 2; ++g) {
            const float *group = span + g * group_size;
            float32x4_t total = vdupq_n_f32(0.0f);
            for (std::size_t i = 0; i < group_size; i += 4) total = vaddq_f32(total, vld1q_f32(group + i));
            out.sum[2 * s + g] = vaddvq_f32(total);
        }
        out.span_sum[s] = out.sum[2 * s] + out.sum[2 * s + 1];
        if (out.codes == nullptr) continue;
        if (!std::isfinite(out.span_sum[s])) {
            mark_not_finite_bytes(out, for_gemv, s);
        } else if (for_gemv) {
            std::int8_t *bytes = out.bytes + s * (2 * span_size);
            out.scale[s] = round_to_bytes(span, span_size, bytes, bytes + span_size);
        } else {
            for (std::size_t g = 2 * s; g < 2 * s + 2; ++g) {
                out.scale[g] = round_to_bytes(out.x + g * group_size, group_size, out.bytes + g * group_size, nullptr);
            }
        }
    }
}

// Of weights, signed.
inline int8x16_t signed_codes(const ByteTable &table) {
    return vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(table.code), vdupq_n_u8(table.bias)));
}

// The signed codes of one block, in order.
template <class L>
void unpack_signed(const std::uint8_t *p, int8x16_t table, int8x16_t out[L::block / 16]) {
    uint8x16_t code[L::block / 16];
    Neon::unpack<L>(p, code);
    for (int i = 0; i < L::block / 16; ++i) {
        if constexpr (L::bits == 8) out[i] = vreinterpretq_s8_u8(code[i]);
        else out[i] = vqtbl1q_s8(table, code[i]);
    }
}

// Four rows together share the loads of x; what a block of each contributes is one lane of the sums.
template <class S, class L>
class ByteDot {
  public:
    static constexpr std::size_t rows_at_once = 4, bytes_ahead = codes_ahead;

    ByteDot(const Matrix &w, const TokenInput &x, std::size_t column, std::size_t n, std::size_t ahead)
        : n_(n), ahead_(ahead), in_(x.bytes + 2 * column), in_scale_(x.scale + column / span_size),
          sum_(block_sums<L>(x) + column / L::block), codes_(signed_codes(byte_table_of(w))),
          step_(byte_table_of(w).step / low_terms), offset_(residual_offset(byte_table_of(w))) {}

    void operator()(const Rows<rows_at_once> &rows, float32x4_t total[rows_at_once]) const {
        alignas(16) float both[max_blocks][R];  // scales of weights and inputs, multiplied
        for (std::size_t b = 0; b < n_; b += S::width) {
            const float32x4_t in_scale = input_scales(in_scale_ + b / per_span);
            int32x4_t products[R];
            for (std::size_t r = 0; r < R; ++r) {
                const float32x4_t scale = S::load(rows.scale[r] + b);
                products[r] = vreinterpretq_s32_f32(S::mul(scale, in_scale));
                if constexpr (!L::adds_tau) continue;
                const float32x4_t tau = S::fma(scale, S::set1(offset_), S::load(rows.tau[r] + b));
                total[r] = S::add_product(tau, sum_ + b, n_ - b, total[r]);
            }
            transpose(products);
            for (std::size_t r = 0; r < R; ++r) S::store(both[b + r], vreinterpretq_f32_s32(products[r]));
        }
        float32x4_t sums = S::zero();
        for (std::size_t b = 0; b < n_; ++b) {
            prefetch(rows.codes[0] + R * b * L::stride, ahead_, R * L::stride);
            sums = S::fma(vcvtq_f32_s32(block_sums_of(rows, b)), S::load(both[b]), sums);
        }
        float of_rows[R];
        S::store(of_rows, S::mul(sums, S::set1(step_)));
        for (std::size_t r = 0; r < R; ++r) total[r] = S::add(total[r], vsetq_lane_f32(of_rows[r], S::zero(), 0));
    }

  private:
    static constexpr std::size_t R = rows_at_once, N = L::block / 16, per_span = span_size / L::block;

    // Of block b, 256 times that of the high codes and the low ones: 64 * 128 * (127 * 256 + 128) < 2^31.
    int32x4_t block_sums_of(const Rows<R> &rows, std::size_t b) const {
        const std::int8_t *in = in_ + b / per_span * (2 * span_size) + b % per_span * L::block;
        int8x16_t high[N], low[N];
        for (std::size_t i = 0; i < N; ++i) {
            high[i] = vld1q_s8(in + 16 * i);
            low[i] = vld1q_s8(in + span_size + 16 * i);
        }
        int32x4_t sums[R];
#pragma GCC unroll 4
        for (std::size_t r = 0; r < R; ++r) {
            int8x16_t weight[N];
            unpack_signed<L>(rows.codes[r] + b * L::stride, codes_, weight);
            sums[r] = vdupq_n_s32(0);
            for (std::size_t i = 0; i < N; ++i) sums[r] = vdotq_s32(sums[r], weight[i], high[i]);
            sums[r] = vshlq_n_s32(sums[r], 8);
            for (std::size_t i = 0; i < N; ++i) sums[r] = vdotq_s32(sums[r], weight[i], low[i]);
        }
        return vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
    }

    // Of the next 4 blocks; p has one for every 64 columns.
    static float32x4_t input_scales(const float *p) {
        const float32x4_t spans = vld1q_f32(p);
        if constexpr (per_span == 1) return spans;
        else return vzip1q_f32(spans, spans);
    }

    std::size_t n_, ahead_;
    const std::int8_t *in_;
    const float *in_scale_, *sum_;
    int8x16_t codes_;
    float step_, offset_;
};

}  // namespace
}  // namespace irq
