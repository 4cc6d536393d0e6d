// Fast mode on AVX-512 VNNI: vpdpbusd multiplies unsigned 8-bit codes of weights by signed 8-bit codes of inputs
// and adds four. Inputs are scale * (high + low / 256), a scale for every 32 columns: the second product of the
// same unpacked weights takes the rounding of the inputs away.
#pragma once

#include "avx512_ops.h"
#include "simd_gemv.h"

namespace irq {
namespace {

inline void prepare_bytes(const float *x, std::size_t columns, std::size_t stride, const TokenInput &out) {
    std::memcpy(out.x, x, columns * sizeof(float));
    for (std::size_t i = columns; i < stride; ++i) out.x[i] = 0.0f;
    for (std::size_t g = 0; g < stride / group_size; ++g) {
        const __m512 v[2] = {_mm512_loadu_ps(out.x + g * group_size), _mm512_loadu_ps(out.x + g * group_size + 16)};
        out.sum[g] = _mm512_reduce_add_ps(_mm512_add_ps(v[0], v[1]));
        if (g % 2 == 1) out.span_sum[g / 2] = out.sum[g - 1] + out.sum[g];
        if (out.codes == nullptr) continue;
        if (!std::isfinite(out.sum[g])) {
            mark_group_not_finite(out, g);
            continue;
        }
        const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_abs_ps(v[1])));
        const __m512 rate = _mm512_set1_ps(code_rate(top, largest_high_code));
        __m512i total = _mm512_setzero_si512();
        for (std::size_t i = 0; i < 2; ++i) {
            const __m512 value = _mm512_mul_ps(v[i], rate);
            const __m512i high = _mm512_cvtps_epi32(value);
            const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_cvtepi32_ps(high)), _mm512_set1_ps(low_terms));
            const __m512i low = _mm512_cvtps_epi32(rest);
            auto *codes = reinterpret_cast<__m128i *>(high_codes(out, g) + 16 * i);
            _mm_storeu_si128(codes, _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(codes + span_size / 16, _mm512_cvtsepi32_epi8(low));  // 128 becomes 127
            total = _mm512_add_epi32(total, high);
        }
        out.scale[g] = top / largest_high_code;
        out.start[g] = -byte_bias * _mm512_reduce_add_epi32(total);
    }
}

// Columns go 64 at a time: one block or two. What the offset of the codes adds joins tau.
template <class S, class L>
class ByteDot {
  public:
    explicit ByteDot(const Matrix &w) : codes_(S::template codes<L>(byte_table_of(w))) {
        step_ = _mm512_set1_ps(byte_table_of(w).step / low_terms);
        offset_ = _mm512_set1_ps(byte_table_of(w).offset);
    }

    void operator()(const Tile &rows, const TokenInput &x, std::size_t column, __m512 total[together]) const {
        add_all_offsets(rows, block_sums<L>(x) + column / L::block, total);
        const float *in_scale = x.scale + column / group_size;
        const std::int8_t *in = x.bytes + 2 * column;
        for_each_block<L, per_step>(rows, [&](std::size_t b) {
            const Input now = input(in + 2 * L::block * b, in_scale + b * L::block / group_size);
            for (std::size_t r = 0; r < together; ++r) {
                const __m512 part = product(rows.codes[r] + b * L::stride, now);
                total[r] = _mm512_fmadd_ps(part, scale_of(rows.scale[r] + b), total[r]);
            }
        });
        if (rows.blocks % per_step == 0) return;
        const std::size_t b = rows.blocks - 1;
        const Input now = input(in + 2 * L::block * b, in_scale + b * L::block / group_size);
        for (std::size_t r = 0; r < together; ++r) {
            std::uint8_t last[2 * L::stride] = {};  // a block of zeros behind the last one
            std::memcpy(last, rows.codes[r] + b * L::stride, L::stride - L::lead);
            const __m512 part = product(last, now), scale = _mm512_set1_ps(rows.scale[r][b]);
            total[r] = _mm512_mask3_fmadd_ps(part, scale, total[r], 0x00ff);
        }
    }

  private:
    static constexpr std::size_t per_step = span_size / L::block;

    struct Input {
        __m512i high, low;
        __m512 scale;
    };

    Input input(const std::int8_t *bytes, const float *scale) const {
        return {_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes + span_size), _mm512_mul_ps(S::halves(scale), step_)};
    }

    __m512 product(const std::uint8_t *p, const Input &in) const {
        const __m512i weight = S::template unpack<L>(p, codes_);
        const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weight, in.high);
        const __m512i both = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), weight, in.low);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(both), in.scale);
    }

    static __m512 scale_of(const float *scale) {
        if constexpr (per_step == 1) return _mm512_set1_ps(*scale);
        else return S::halves(scale);
    }

    void add_all_offsets(const Tile &rows, const float *sum, __m512 total[together]) const {
        for (std::size_t b = 0; b < rows.blocks; b += S::width) {
            for (std::size_t r = 0; r < together; ++r) {
                __m512 tau = _mm512_mul_ps(S::load(rows.scale[r] + b), offset_);
                if constexpr (L::adds_tau) tau = _mm512_add_ps(tau, S::load(rows.tau[r] + b));
                total[r] = S::add_product(tau, sum + b, rows.blocks - b, total[r]);
            }
        }
    }

    typename S::Codes codes_;
    __m512 step_, offset_;
};

}  // namespace
}  // namespace irq
