// The vector operations of AVX2 with FMA and F16C, 8 floats wide.
//
// Exact: a register holds 8 floats, so 16 levels are two vpermps and a blend by bit 3. Fast: pshufb looks
// the two bytes of a weight's code up, unpacking joins them to words, pmaddwd multiplies and adds pairs.
#pragma once

#include <immintrin.h>

#include "block_layout.h"

namespace irq {
namespace {

struct Avx2 {
    using Vec = __m256;
    static constexpr std::size_t width = 8, tile_rows = 4, tile_tokens = 3, code_tokens = 4;

    static Vec zero() { return _mm256_setzero_ps(); }
    static Vec set1(float v) { return _mm256_set1_ps(v); }
    static Vec load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    static Vec abs(Vec v) { return _mm256_andnot_ps(set1(-0.0f), v); }
    static float sum(Vec v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static float max_of(Vec v) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    // The sums of four vectors.
    static void sums(const Vec v[4], float out[4]) {
        const Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    }
    static void store_int16(std::int16_t *p, Vec v) {  // to the nearest, ties to even
        const __m256i dwords = _mm256_cvtps_epi32(v);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), words);
    }

    // The first n (any number) of 8 floats, zeros behind them.
    static __m256i first(std::size_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), counting());
    }
    static Vec load_part(const float *p, std::size_t n) { return _mm256_maskload_ps(p, first(n)); }
    // The lanes of `a` past n may hold anything, NaN too: they are cut off before they meet a zero.
    static Vec add_product(Vec a, const float *p, std::size_t n, Vec c) {
        return fma(_mm256_and_ps(a, _mm256_castsi256_ps(first(n))), load_part(p, n), c);
    }
    static __m256i counting() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
    static __m128i load64(const void *p) { return _mm_loadl_epi64(static_cast<const __m128i *>(p)); }
    static __m128i load128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
    static __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

    static float load_half(const void *p) { return _cvtsh_ss(load_as<std::uint16_t>(p)); }
    static Vec load_f16(const void *p) { return _mm256_cvtph_ps(load128(p)); }
    static Vec load_bf16(const void *p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
    }

    static void expand_f16(const std::uint8_t *half, std::size_t n, float *out) {
        std::size_t i = 0;
        for (; i + 8 <= n; i += 8) store(out + i, load_f16(half + 2 * i));
        for (; i < n; ++i) out[i] = load_half(half + 2 * i);
    }

    static Vec dq8(Vec mapped, float absmax, float offset, bool round_half) {
        const Vec value = add(mul(mapped, set1(absmax)), set1(offset));
        return round_half ? _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)) : value;
    }

    static void expand_dq8(const std::uint8_t *index, std::size_t n, float absmax, float offset, bool round_half,
                           float *out) {
        std::size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            // Eight plain loads; a gather takes half as long again (Zen 5).
            const auto at = [index, i](std::size_t j) { return irq_dynamic_map[index[i + j]]; };
            const Vec mapped = _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
            store(out + i, dq8(mapped, absmax, offset, round_half));
        }
        float rest[8] = {};
        for (std::size_t j = 0; i + j < n; ++j) rest[j] = irq_dynamic_map[index[i + j]];
        store(out + i, dq8(load(rest), absmax, offset, round_half));
    }

    // --- exact ---

    struct Levels {
        Vec low, high;  // 4 bits: levels 0-7 and 8-15; fewer: all in `low`
    };

    template <class L>
    static Levels levels(const float *level) {
        if constexpr (L::bits == 8) return {zero(), zero()};
        else if constexpr (L::bits == 4) return {load(level), load(level + 8)};
        else if constexpr (L::bits == 3) return {load(level), zero()};
        else return {_mm256_broadcast_ps(reinterpret_cast<const __m128 *>(level)), zero()};
    }

    // Bits above the code may be anything but, for 3 bits, zero.
    template <class L>
    static Vec look_up(__m256i code, const Levels &table) {
        const Vec value = _mm256_permutevar8x32_ps(table.low, code);
        if constexpr (L::bits != 4) return value;
        const Vec upper = _mm256_permutevar8x32_ps(table.high, code);
        return _mm256_blendv_ps(value, upper, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    }

    // Levels of 8 codes: the low bits stand at `low_bits` of each dword, bit 2 of code i is bit i of `high`.
    template <class L>
    static Vec plane(__m256i low_bits, const Levels &table, unsigned high) {
        if constexpr (L::bits != 3) return look_up<L>(low_bits, table);
        const __m256i bit = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(high)), counting());
        const __m256i four = _mm256_set1_epi32(4), three = _mm256_set1_epi32(3);
        const __m256i upper = _mm256_and_si256(_mm256_slli_epi32(bit, 2), four);
        return look_up<L>(_mm256_or_si256(_mm256_and_si256(low_bits, three), upper), table);
    }

    // The levels of one block, in order.
    template <class L>
    static void decode(const std::uint8_t *p, const Levels &table, Vec out[L::block / 8]) {
        if constexpr (L::bits == 8) {
            for (int i = 0; i < 4; ++i) out[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(p + 8 * i)));
        } else {
            constexpr int planes = L::bits == 4 ? 2 : 4, per_plane = L::block / 8 / planes;
            constexpr int plane_bits = 8 / planes;
            for (int i = 0; i < per_plane; ++i) {
                const __m256i bytes = _mm256_cvtepu8_epi32(load64(p + 8 * i));
                for (int k = 0; k < planes; ++k) {
                    const int at = k * per_plane + i;
                    const unsigned high = L::bits == 3 ? p[L::block / 4 + at] : 0u;
                    out[at] = plane<L>(_mm256_srli_epi32(bytes, plane_bits * k), table, high);
                }
            }
        }
    }

    // --- fast ---

    using Words = __m256i;     // 16 of 16 bits
    using Products = __m256i;  // 8 of 32 bits

    struct Codes {
        __m256i low, high;  // bytes of the codes
    };

    template <class L>
    static Codes codes(const CodeTable &table) {
        const __m256i even_odd = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0f0d0b0907050301, 0x0e0c0a0806040200));
        const __m256i split = _mm256_shuffle_epi8(load256(table.code), even_odd);  // 8 low, 8 high; twice
        return {_mm256_permute4x64_epi64(split, 0x88), _mm256_permute4x64_epi64(split, 0xdd)};
    }

    static __m256i join(__m128i low, __m128i high) { return _mm256_set_m128i(high, low); }
    static __m256i swap_middle(__m256i v) { return _mm256_permute4x64_epi64(v, 0xd8); }  // quadwords 0 2 1 3

    // 4 in every byte whose bit is set.
    static __m256i spread_bits(std::uint32_t bits) {
        const __m256i source = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
        const __m256i each = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201ull));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<std::int32_t>(bits)), source);
        return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each), _mm256_set1_epi8(4));
    }

    // The codes of one block as bytes, the middle quadwords of every 32 swapped; above them other bits.
    template <class L>
    static void split(const std::uint8_t *p, __m256i out[L::block / 32]) {
        if constexpr (L::bits == 4 && L::block == 64) {
            out[0] = swap_middle(load256(p));
            out[1] = _mm256_srli_epi16(out[0], 4);
        } else if constexpr (L::bits == 4) {
            const __m128i low = load128(p), high = _mm_srli_epi16(low, 4);
            out[0] = join(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
        } else if constexpr (L::block == 64) {
            const __m256i twice = swap_middle(_mm256_broadcastsi128_si256(load128(p)));
            out[0] = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 2, 0, 2));
            out[1] = _mm256_srli_epi16(out[0], 4);
        } else {
            const __m256i bytes = _mm256_set1_epi64x(load_as<std::int64_t>(p));
            out[0] = _mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 4, 2, 6));
        }
    }

    // The weight codes of one block, in order.
    template <class L>
    static void unpack(const std::uint8_t *p, const Codes &table, Words out[L::block / 16]) {
        if constexpr (L::bits == 8) {
            for (int i = 0; i < 2; ++i) out[i] = _mm256_cvtepi8_epi16(load128(p + 16 * i));
        } else {
            __m256i codes[L::block / 32];
            split<L>(p, codes);
            for (int i = 0; i < L::block / 32; ++i) {
                __m256i index = _mm256_and_si256(codes[i], _mm256_set1_epi8(L::bits == 4 ? 15 : 3));
                if constexpr (L::bits == 3) {
                    const auto high = load_as<std::uint32_t>(p + L::block / 4 + 4 * i);
                    index = _mm256_or_si256(index, swap_middle(spread_bits(high)));
                }
                const __m256i low = _mm256_shuffle_epi8(table.low, index);
                const __m256i high = _mm256_shuffle_epi8(table.high, index);
                out[2 * i] = _mm256_unpacklo_epi8(low, high);
                out[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
            }
        }
    }

    static Words load_words(const std::int16_t *p) { return load256(p); }
    static void store_words(std::int16_t *p, Words v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }
    static Words two_words(const std::int16_t *p) { return _mm256_set1_epi32(load_as<std::int32_t>(p)); }
    static Products no_products() {  // as if unknown: sums that GCC sees begin with 0 it leaves no registers
        Products none = _mm256_setzero_si256();
        asm("" : "+x"(none));
        return none;
    }
    // sum[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]
    static Products add_products(Products sum, Words a, Words b) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }
    static Vec to_float(Products sum) { return _mm256_cvtepi32_ps(sum); }

    // Rows of 8 dwords become columns.
    static void transpose(__m256i v[8]) {
        __m256i t[8];
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
            t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {  // v[i + c]: column c of each 128-bit lane, rows i..i+3
            v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
            v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
            v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int c = 0; c < 4; ++c) {
            t[c] = _mm256_permute2x128_si256(v[c], v[4 + c], 0x20);
            t[4 + c] = _mm256_permute2x128_si256(v[c], v[4 + c], 0x31);
        }
        for (int i = 0; i < 8; ++i) v[i] = t[i];
    }
};

}  // namespace
}  // namespace irq
