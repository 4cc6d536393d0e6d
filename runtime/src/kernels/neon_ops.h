// The vector operations of AArch64, 4 floats wide; no extension is needed.
//
// Exact: tbl looks 16 bytes up at once, so a table of floats is four tables, one for each byte of the float
// (ld4 splits them), and zips put the bytes together again. Fast on words: the same with the two bytes of a weight's
// code; smlal multiplies words and adds. Fast on bytes, with the dot-product extension: neon_bytes.h.
#pragma once

#include <arm_neon.h>

#include "block_layout.h"

namespace irq {
namespace {

struct Neon {
    using Vec = float32x4_t;
    static constexpr std::size_t width = 4, tile_rows = 4, tile_tokens = 5;

    static Vec zero() { return vdupq_n_f32(0.0f); }
    static Vec set1(float v) { return vdupq_n_f32(v); }
    static Vec load(const float *p) { return vreinterpretq_f32_u8(load16(p)); }
    static void store(float *p, Vec v) { vst1q_f32(p, v); }
    static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
    static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
    static Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
    static Vec abs(Vec v) { return vabsq_f32(v); }
    static float sum(Vec v) { return vaddvq_f32(v); }
    static float max_of(Vec v) { return vmaxvq_f32(v); }
    // The sums of four vectors.
    static void sums(const Vec v[4], float out[4]) {
        vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])));
    }
    static void store_int16(std::int16_t *p, Vec v) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(v))); }

    // The first n (any number) of 4 floats, zeros behind them.
    static Vec load_part(const float *p, std::size_t n) {
        float some[4] = {};
        std::memcpy(some, p, (n < 4 ? n : 4) * sizeof(float));
        return load(some);
    }
    // The lanes of `a` past n may hold anything, NaN too.
    static Vec add_product(Vec a, const float *p, std::size_t n, Vec c) {
        if (n >= 4) return fma(a, load(p), c);
        float lanes[4];
        store(lanes, a);
        return fma(load_part(lanes, n), load_part(p, n), c);
    }
    static uint8x16_t load16(const void *p) { return vld1q_u8(static_cast<const std::uint8_t *>(p)); }
    static uint8x8_t load8(const void *p) { return vld1_u8(static_cast<const std::uint8_t *>(p)); }

    static float load_half(const void *p) {
        return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load_as<std::uint16_t>(p)))), 0);
    }
    static Vec load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(load8(p))); }
    static Vec load_bf16(const void *p) {
        return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(load8(p)), 16));
    }

    static void expand_f16(const std::uint8_t *half, std::size_t n, float *out) {
        std::size_t i = 0;
        for (; i + 4 <= n; i += 4) store(out + i, load_f16(half + 2 * i));
        for (; i < n; ++i) out[i] = load_half(half + 2 * i);
    }

    static void expand_dq8(const std::uint8_t *index, std::size_t n, float absmax, float offset, bool round_half,
                           float *out) {
        const auto expand_four = [=](const std::uint8_t *at, float *to) {
            const Vec mapped = {irq_dynamic_map[at[0]], irq_dynamic_map[at[1]], irq_dynamic_map[at[2]],
                                irq_dynamic_map[at[3]]};
            Vec value = add(mul(mapped, set1(absmax)), set1(offset));
            if (round_half) value = vcvt_f32_f16(vcvt_f16_f32(value));
            store(to, value);
        };
        std::size_t i = 0;
        for (; i + 4 <= n; i += 4) expand_four(index + i, out + i);
        if (i == n) return;
        std::uint8_t last[4] = {};
        std::memcpy(last, index + i, n - i);
        expand_four(last, out + i);
    }

    // The Block / 8 bytes of bits at p, again and again.
    template <int Block>
    static uint8x16_t load_bits(const std::uint8_t *p) {
        if constexpr (Block == 64) return vreinterpretq_u8_u64(vdupq_n_u64(load_as<std::uint64_t>(p)));
        else return vreinterpretq_u8_u32(vdupq_n_u32(load_as<std::uint32_t>(p)));
    }
    // All ones in byte j where bit 16 * i + j is set.
    static uint8x16_t spread_bits(uint8x16_t bits, int i) {
        constexpr std::uint8_t each[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        constexpr std::uint8_t at[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
        const uint8x16_t index = vaddq_u8(vld1q_u8(at), vdupq_n_u8(static_cast<std::uint8_t>(2 * i)));
        return vtstq_u8(vqtbl1q_u8(bits, index), vld1q_u8(each));
    }

    // The codes of one block, in order.
    template <class L>
    static void unpack(const std::uint8_t *p, uint8x16_t out[L::block / 16]) {
        if constexpr (L::bits == 8) {
            for (int i = 0; i < 2; ++i) out[i] = load16(p + 16 * i);
        } else if constexpr (L::bits == 4) {
            constexpr int planes = L::block / 32;
            for (int i = 0; i < planes; ++i) {
                const uint8x16_t codes = load16(p + 16 * i);
                out[i] = vandq_u8(codes, vdupq_n_u8(15));
                out[planes + i] = vshrq_n_u8(codes, 4);
            }
        } else {
            if constexpr (L::block == 64) {
                const uint8x16_t codes = load16(p);
                out[0] = codes;
                out[1] = vshrq_n_u8(codes, 2);
                out[2] = vshrq_n_u8(codes, 4);
                out[3] = vshrq_n_u8(codes, 6);
            } else {
                const uint8x8_t codes = load8(p);
                out[0] = vcombine_u8(codes, vshr_n_u8(codes, 2));
                out[1] = vcombine_u8(vshr_n_u8(codes, 4), vshr_n_u8(codes, 6));
            }
            for (int i = 0; i < L::block / 16; ++i) out[i] = vandq_u8(out[i], vdupq_n_u8(3));
            if constexpr (L::bits == 3) {
                const uint8x16_t bits = load_bits<L::block>(p + L::block / 4);
                for (int i = 0; i < L::block / 16; ++i) {
                    out[i] = vbslq_u8(vdupq_n_u8(4), spread_bits(bits, i), out[i]);
                }
            }
        }
    }

    // --- exact ---

    struct Levels {
        uint8x16x4_t bytes;  // byte b of every level
    };

    template <class L>
    static Levels levels(const float *level) {
        std::uint8_t raw[64] = {};
        if constexpr (L::bits != 8) std::memcpy(raw, level, sizeof(float) << L::bits);
        return {vld4q_u8(raw)};
    }

    template <class L>
    static void decode(const std::uint8_t *p, const Levels &table, Vec out[L::block / 4]) {
        uint8x16_t code[L::block / 16];
        unpack<L>(p, code);
        for (int i = 0; i < L::block / 16; ++i, out += 4) {
            if constexpr (L::bits == 8) {
                const int8x16_t bytes = vreinterpretq_s8_u8(code[i]);
                const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
                out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
                out[1] = vcvtq_f32_s32(vmovl_high_s16(low));
                out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
                out[3] = vcvtq_f32_s32(vmovl_high_s16(high));
            } else {
                uint8x16_t b[4];
                for (int k = 0; k < 4; ++k) b[k] = vqtbl1q_u8(table.bytes.val[k], code[i]);
                const uint16x8_t low[2] = {vreinterpretq_u16_u8(vzip1q_u8(b[0], b[1])),
                                           vreinterpretq_u16_u8(vzip2q_u8(b[0], b[1]))};
                const uint16x8_t high[2] = {vreinterpretq_u16_u8(vzip1q_u8(b[2], b[3])),
                                            vreinterpretq_u16_u8(vzip2q_u8(b[2], b[3]))};
                for (int k = 0; k < 2; ++k) {
                    out[2 * k] = vreinterpretq_f32_u16(vzip1q_u16(low[k], high[k]));
                    out[2 * k + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[k], high[k]));
                }
            }
        }
    }

    // --- fast, words ---

    using Words = int16x8_t;
    using Products = int32x4_t;

    struct Codes {
        uint8x16x2_t bytes;  // low and high, of every code
    };

    template <class L>
    static Codes codes(const CodeTable &table) {
        return {vld2q_u8(reinterpret_cast<const std::uint8_t *>(table.code))};
    }

    // The weight codes of one block, in order.
    template <class L>
    static void unpack(const std::uint8_t *p, const Codes &table, Words out[L::block / 8]) {
        uint8x16_t code[L::block / 16];
        unpack<L>(p, code);
        for (int i = 0; i < L::block / 16; ++i) {
            if constexpr (L::bits == 8) {
                const int8x16_t bytes = vreinterpretq_s8_u8(code[i]);
                out[2 * i] = vmovl_s8(vget_low_s8(bytes));
                out[2 * i + 1] = vmovl_high_s8(bytes);
            } else {
                const uint8x16_t low = vqtbl1q_u8(table.bytes.val[0], code[i]);
                const uint8x16_t high = vqtbl1q_u8(table.bytes.val[1], code[i]);
                out[2 * i] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
                out[2 * i + 1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
            }
        }
    }

    static Words load_words(const std::int16_t *p) { return vld1q_s16(p); }
    static Products no_products() { return vdupq_n_s32(0); }
    static Products add_products(Products sum, Words a, Words b) {
        return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
    }
    static Vec to_float(Products sum) { return vcvtq_f32_s32(sum); }
};

}  // namespace
}  // namespace irq
