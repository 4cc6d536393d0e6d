// The vector operations of AVX-512 (F, BW, DQ, VL, VNNI, VBMI), 16 floats wide.
//
// Exact: 16 codes become 16 dwords, and vpermps looks them up in a table that is one register. It reads
// the low 4 bits of an index, so codes need shifting down but no masking: tables of 4 and 8 levels are
// repeated over the bits above. Fast: 64 codes become 64 bytes in element order by one broadcast and one shift
// per quadword, and vpermb (low 6 bits) looks them up; what becomes of them is avx512_bytes.h.
#pragma once

#include <immintrin.h>

#include "block_layout.h"

namespace irq {
namespace {

struct Avx512 {
    using Vec = __m512;
    static constexpr std::size_t width = 16, tile_rows = 4, tile_tokens = 6;

    static Vec zero() { return _mm512_setzero_ps(); }
    static Vec set1(float v) { return _mm512_set1_ps(v); }
    static Vec load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static Vec abs(Vec v) { return _mm512_abs_ps(v); }
    static float sum(Vec v) { return _mm512_reduce_add_ps(v); }
    static float max_of(Vec v) { return _mm512_reduce_max_ps(v); }
    // The sums of four vectors.
    static void sums(const Vec v[4], float out[4]) {
        const Vec first = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        const Vec last = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(last);
        const Vec lower = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), upper = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        const Vec of_lanes = _mm512_add_ps(lower, upper);  // four sums in every 128 bits
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(of_lanes), _mm512_extractf32x8_ps(of_lanes, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }

    // The first n (any number) of 16 lanes.
    static __mmask16 first(std::size_t n) { return static_cast<__mmask16>(_bzhi_u32(0xffff, n < 16 ? n & 15 : 16)); }
    // c + a * p in the first n lanes. Reads 16 floats: Activations end in so many. (A masked load whose hidden lanes
    // lie in a page that is not there costs microseconds.)
    static Vec add_product(Vec a, const float *p, std::size_t n, Vec c) {
        return _mm512_mask3_fmadd_ps(a, load(p), c, first(n));
    }
    static __m128i load128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
    static __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

    static float load_half(const void *p) { return _cvtsh_ss(load_as<std::uint16_t>(p)); }
    static Vec load_f16(const void *p) { return _mm512_cvtph_ps(load256(p)); }
    static Vec load_bf16(const void *p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
    }

    static void expand_f16(const std::uint8_t *half, std::size_t n, float *out) {
        std::size_t i = 0;
        for (; i + 16 <= n; i += 16) store(out + i, load_f16(half + 2 * i));
        const __m256i rest = _mm256_maskz_loadu_epi16(first(n - i), half + 2 * i);
        store(out + i, _mm512_cvtph_ps(rest));
    }

    // table[index] for 64 indices into 256 bytes: two 128-entry look-ups, the index's high bit chooses.
    static __m512i map_bytes(__m512i index, const std::uint8_t *table) {
        const __m512i below = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
        const __m512i above =
            _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), index, _mm512_loadu_si512(table + 192));
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), below, above);
    }

    static void store_dq8(__m512i map_bits, Vec absmax, Vec offset, bool round, float *out) {
        Vec value = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(map_bits), absmax), offset);
        if (round) value = _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        store(out, value);
    }

    // 64 values at a time, byte by byte of the float: four gathers would cost half of what their blocks do.
    static void expand_dq8(const std::uint8_t *index, std::size_t n, float absmax, float offset, bool round,
                           float *out) {
        // Dwords of indices in this order leave the unpacking below in element order.
        const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        const Vec a = set1(absmax), o = set1(offset);
        if (n <= 16) {  // a gather after all
            const __m512i at = dwords(_mm_maskz_loadu_epi8(first(n), index));
            const Vec mapped = _mm512_mask_i32gather_ps(zero(), first(n), at, irq_dynamic_map, 4);
            return store_dq8(_mm512_castps_si512(mapped), a, o, round, out);
        }
        const std::uint8_t *plane = dynamic_map_planes();
        for (std::size_t i = 0; i < n; i += 64) {
            const __mmask64 some = _bzhi_u64(~0ull, static_cast<unsigned>(n - i < 64 ? n - i : 64));
            const __m512i at = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(some, index + i));
            const __m512i b0 = map_bytes(at, plane), b1 = map_bytes(at, plane + 256);
            const __m512i b2 = map_bytes(at, plane + 512), b3 = map_bytes(at, plane + 768);
            const __m512i low = _mm512_unpacklo_epi8(b0, b1), low_top = _mm512_unpacklo_epi8(b2, b3);
            const __m512i high = _mm512_unpackhi_epi8(b0, b1), high_top = _mm512_unpackhi_epi8(b2, b3);
            store_dq8(_mm512_unpacklo_epi16(low, low_top), a, o, round, out + i);
            store_dq8(_mm512_unpackhi_epi16(low, low_top), a, o, round, out + i + 16);
            store_dq8(_mm512_unpacklo_epi16(high, high_top), a, o, round, out + i + 32);
            store_dq8(_mm512_unpackhi_epi16(high, high_top), a, o, round, out + i + 48);
        }
    }

    // --- exact ---

    struct Levels {
        Vec low, high;  // of codes without and with bit 2 (3-bit codebooks); else all in `low`
    };

    template <class L>
    static Levels levels(const float *level) {
        if constexpr (L::bits == 8) return {zero(), zero()};
        else if constexpr (L::bits == 4) return {load(level), zero()};
        else if constexpr (L::bits == 3)
            return {_mm512_broadcast_f32x4(_mm_loadu_ps(level)), _mm512_broadcast_f32x4(_mm_loadu_ps(level + 4))};
        else return {_mm512_broadcast_f32x4(_mm_loadu_ps(level)), zero()};
    }

    static __m512i dwords(__m128i bytes) { return _mm512_cvtepu8_epi32(bytes); }
    static Vec look_up(__m512i code, Vec table) { return _mm512_permutexvar_ps(code, table); }

    template <class L>
    static Vec look_up(__m512i code, const Levels &table, const std::uint8_t *high_bits) {
        const Vec value = look_up(code, table.low);
        if constexpr (L::bits != 3) return value;
        else return _mm512_mask_permutexvar_ps(value, load_as<std::uint16_t>(high_bits), code, table.high);
    }

    // The levels of one block, in order.
    template <class L>
    static void decode(const std::uint8_t *p, const Levels &table, Vec out[L::block / 16]) {
        if constexpr (L::bits == 8) {
            for (int i = 0; i < 2; ++i) out[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p + 16 * i)));
        } else if constexpr (L::bits == 4) {
            constexpr int planes = L::block / 32;
            for (int i = 0; i < planes; ++i) {
                const __m512i codes = dwords(load128(p + 16 * i));
                out[i] = look_up(codes, table.low);
                out[planes + i] = look_up(_mm512_srli_epi32(codes, 4), table.low);
            }
        } else if constexpr (L::block == 64) {
            const __m512i codes = dwords(load128(p));
            for (unsigned i = 0; i < 4; ++i) {
                out[i] = look_up<L>(_mm512_srli_epi32(codes, 2 * i), table, p + 16 + 2 * i);
            }
        } else {  // 8 bytes, twice: planes 0 and 1, 2 and 3
            const __m512i codes = dwords(_mm_set1_epi64x(load_as<std::int64_t>(p)));
            const __m512i shift = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
            const __m512i planes = _mm512_srlv_epi32(codes, shift);
            out[0] = look_up<L>(planes, table, p + 8);
            out[1] = look_up<L>(_mm512_srli_epi32(planes, 4), table, p + 10);
        }
    }

    // --- fast ---

    struct Codes {
        __m512i low, high;  // like Levels, bytes
    };

    // With `shift` added to every code.
    template <class L>
    static Codes codes(const ByteTable &table, int shift = 0) {
        const __m128i code = _mm_add_epi8(load128(table.code), _mm_set1_epi8(static_cast<char>(shift)));
        if constexpr (L::bits == 4) return {_mm512_broadcast_i32x4(code), _mm512_setzero_si512()};
        return {_mm512_broadcastd_epi32(code), _mm512_broadcastd_epi32(_mm_srli_si128(code, 4))};
    }

    // 64 unsigned codes in order: of one block of 64 or two of 32.
    template <class L>
    static __m512i unpack(const std::uint8_t *p, const Codes &table) {
        if constexpr (L::bits == 8) {
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(load256(p)), load256(p + L::stride), 1);
            return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
        } else if constexpr (L::bits == 4) {
            __m512i bytes, shift;
            if constexpr (L::block == 64) {
                bytes = _mm512_broadcast_i64x4(load256(p));
                shift = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
            } else {
                bytes = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load128(p)), 0xff00, load128(p + L::stride));
                shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
            }
            return _mm512_permutexvar_epi8(_mm512_srlv_epi64(bytes, shift), table.low);
        } else {
            __m512i bytes, shift;
            std::uint64_t high = 0;
            if constexpr (L::block == 64) {
                bytes = _mm512_broadcast_i32x4(load128(p));
                shift = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);
                if constexpr (L::bits == 3) high = load_as<std::uint64_t>(p + 16);
            } else {
                const __m512i first_block = _mm512_set1_epi64(load_as<std::int64_t>(p));
                bytes = _mm512_mask_set1_epi64(first_block, 0xf0, load_as<std::int64_t>(p + L::stride));
                shift = _mm512_set_epi64(6, 4, 2, 0, 6, 4, 2, 0);
                if constexpr (L::bits == 3) {
                    high = load_as<std::uint32_t>(p + 8);
                    high |= std::uint64_t{load_as<std::uint32_t>(p + L::stride + 8)} << 32;
                }
            }
            const __m512i index = _mm512_srlv_epi64(bytes, shift);
            const __m512i code = _mm512_permutexvar_epi8(index, table.low);
            if constexpr (L::bits == 2) return code;
            else return _mm512_mask_permutexvar_epi8(code, high, index, table.high);
        }
    }

    // p[0] in the lower half of the lanes, p[1] in the upper.
    static Vec halves(const float *p) {
        const Vec pair = _mm512_castpd_ps(_mm512_set1_pd(load_as<double>(p)));
        return _mm512_permutevar_ps(pair, _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
    }

    // Rows of 16 dwords become columns.
    static void transpose(__m512i v[16]) {
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
        for (int c = 0; c < 4; ++c) {  // lanes 0 1 and 2 3 of rows 0-7 (a) and 8-15 (b)
            const __m512i a01 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x44);
            const __m512i a23 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xee);
            const __m512i b01 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x44);
            const __m512i b23 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xee);
            t[c] = _mm512_shuffle_i32x4(a01, b01, 0x88);
            t[4 + c] = _mm512_shuffle_i32x4(a01, b01, 0xdd);
            t[8 + c] = _mm512_shuffle_i32x4(a23, b23, 0x88);
            t[12 + c] = _mm512_shuffle_i32x4(a23, b23, 0xdd);
        }
        for (int i = 0; i < 16; ++i) v[i] = t[i];
    }
};

}  // namespace
}  // namespace irq
