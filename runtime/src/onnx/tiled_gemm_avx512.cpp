// Compiled with the flags of CMakeLists.txt; runs only where irq::active_isa() says so.
#include <immintrin.h>

#include "tiled_gemm.inl"

namespace irq::onnx {
namespace {

struct Avx512 {
    using Vec = __m512;
    using Int = __m512i;
    using Table = __m512;
    static constexpr std::size_t width = 16, tile_tokens = 12;  // 24 sums, 2 weights and an input in registers

    static Vec zero() { return _mm512_setzero_ps(); }
    static Vec set1(float x) { return _mm512_set1_ps(x); }
    static Vec load(const float *p) { return _mm512_loadu_ps(p); }
    static Vec load(const std::uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static float from_half(std::uint16_t half) { return _cvtsh_ss(half); }

    // v[i][t] becomes v[t][i].
    static void transpose(Vec v[width]) {
        Vec four[4][4];  // [rows 4 g to 4 g + 3] [column c of each 128 bits]
        for (std::size_t g = 0; g < 4; ++g) {
            const Vec *row = v + 4 * g;
            const auto low = [](Vec x, Vec y) { return _mm512_castps_pd(_mm512_unpacklo_ps(x, y)); };
            const auto high = [](Vec x, Vec y) { return _mm512_castps_pd(_mm512_unpackhi_ps(x, y)); };
            const __m512d a = low(row[0], row[1]), b = low(row[2], row[3]);
            const __m512d c = high(row[0], row[1]), d = high(row[2], row[3]);
            four[g][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            four[g][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            four[g][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
            four[g][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
        }
        for (std::size_t c = 0; c < 4; ++c) {
            const Vec a = _mm512_shuffle_f32x4(four[0][c], four[1][c], 0x44);
            const Vec b = _mm512_shuffle_f32x4(four[2][c], four[3][c], 0x44);
            const Vec d = _mm512_shuffle_f32x4(four[0][c], four[1][c], 0xee);
            const Vec e = _mm512_shuffle_f32x4(four[2][c], four[3][c], 0xee);
            v[c] = _mm512_shuffle_f32x4(a, b, 0x88);
            v[4 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
            v[8 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
            v[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
        }
    }

    static Table table(const float *levels) { return _mm512_loadu_ps(levels); }
    static Vec look_up_16(Int index, Table table) { return _mm512_permutexvar_ps(index, table); }
    static Vec look_up_8(Int index, Table table) { return _mm512_permutexvar_ps(index, table); }
    static Int shift_right(Int v, unsigned n) { return _mm512_srli_epi32(v, n); }
    static Int shift_left(Int v, unsigned n) { return _mm512_slli_epi32(v, n); }
    // bit 2 of `high`, the others of `low`
    static Int with_third_bit(Int low, Int high) {
        return _mm512_ternarylogic_epi32(_mm512_set1_epi32(4), high, low, 0xca);
    }
    static Vec from_byte(Int v, unsigned i) {
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8 * i), _mm512_set1_epi32(255)));
    }

    static __m128i load128(const std::uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }

    // word[d]: bytes 4d..4d+3 of 16 rows
    static void load_words(const std::uint8_t *p, std::size_t stride, Int word[4]) {
        Int row[4];  // row[i]: rows i, 4+i, 8+i, 12+i
        for (std::size_t i = 0; i < 4; ++i) {
            row[i] = _mm512_castsi128_si512(load128(p + i * stride));
            row[i] = _mm512_inserti32x4(row[i], load128(p + (4 + i) * stride), 1);
            row[i] = _mm512_inserti32x4(row[i], load128(p + (8 + i) * stride), 2);
            row[i] = _mm512_inserti32x4(row[i], load128(p + (12 + i) * stride), 3);
        }
        const Int a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpacklo_epi32(row[2], row[3]);
        const Int c = _mm512_unpackhi_epi32(row[0], row[1]), d = _mm512_unpackhi_epi32(row[2], row[3]);
        word[0] = _mm512_unpacklo_epi64(a, b);
        word[1] = _mm512_unpackhi_epi64(a, b);
        word[2] = _mm512_unpacklo_epi64(c, d);
        word[3] = _mm512_unpackhi_epi64(c, d);
    }

    static void load_two_words(const std::uint8_t *p, std::size_t stride, Int word[2]) {
        std::int32_t first[width], second[width];
        for (std::size_t r = 0; r < width; ++r) {
            std::memcpy(&first[r], p + r * stride, 4);
            std::memcpy(&second[r], p + r * stride + 4, 4);
        }
        word[0] = _mm512_loadu_si512(first);
        word[1] = _mm512_loadu_si512(second);
    }
};

}  // namespace

const TiledGemm tiled_gemm_avx512 = {Avx512::tile_tokens, pack<Avx512>, multiply<Avx512>};

}  // namespace irq::onnx
