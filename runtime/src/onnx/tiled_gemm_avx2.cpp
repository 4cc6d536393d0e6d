// Compiled with the flags of CMakeLists.txt; runs only where irq::active_isa() says so.
#include <immintrin.h>

#include "tiled_gemm.inl"

namespace irq::onnx {
namespace {

struct Avx2 {
    using Vec = __m256;
    using Int = __m256i;
    struct Table {
        __m256 low, high;
    };
    static constexpr std::size_t width = 8, tile_tokens = 6;  // 12 sums, 2 weights and an input in registers

    static Vec zero() { return _mm256_setzero_ps(); }
    static Vec set1(float x) { return _mm256_set1_ps(x); }
    static Vec load(const float *p) { return _mm256_loadu_ps(p); }
    static Vec load(const std::uint16_t *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static float from_half(std::uint16_t half) { return _cvtsh_ss(half); }

    // v[i][t] becomes v[t][i].
    static void transpose(Vec v[width]) {
        Vec four[2][4];  // [rows 4 g to 4 g + 3] [column c of each 128 bits]
        for (std::size_t g = 0; g < 2; ++g) {
            const Vec *row = v + 4 * g;
            const auto low = [](Vec x, Vec y) { return _mm256_castps_pd(_mm256_unpacklo_ps(x, y)); };
            const auto high = [](Vec x, Vec y) { return _mm256_castps_pd(_mm256_unpackhi_ps(x, y)); };
            const __m256d a = low(row[0], row[1]), b = low(row[2], row[3]);
            const __m256d c = high(row[0], row[1]), d = high(row[2], row[3]);
            four[g][0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            four[g][1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            four[g][2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
            four[g][3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
        }
        for (std::size_t c = 0; c < 4; ++c) {
            v[c] = _mm256_permute2f128_ps(four[0][c], four[1][c], 0x20);
            v[4 + c] = _mm256_permute2f128_ps(four[0][c], four[1][c], 0x31);
        }
    }

    static Table table(const float *levels) { return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)}; }
    static Vec look_up_8(Int index, const Table &table) { return _mm256_permutevar8x32_ps(table.low, index); }
    static Vec look_up_16(Int index, const Table &table) {
        const Vec low = look_up_8(index, table), high = _mm256_permutevar8x32_ps(table.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
    static Int shift_right(Int v, unsigned n) { return _mm256_srli_epi32(v, static_cast<int>(n)); }
    static Int shift_left(Int v, unsigned n) { return _mm256_slli_epi32(v, static_cast<int>(n)); }
    // bit 2 of `high`, the others of `low`
    static Int with_third_bit(Int low, Int high) {
        const Int bit = _mm256_set1_epi32(4);
        return _mm256_or_si256(_mm256_andnot_si256(bit, low), _mm256_and_si256(bit, high));
    }
    static Vec from_byte(Int v, unsigned i) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(shift_right(v, 8 * i), _mm256_set1_epi32(255)));
    }

    static __m128i load128(const std::uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }

    // word[d]: bytes 4d..4d+3 of 8 rows
    static void load_words(const std::uint8_t *p, std::size_t stride, Int word[4]) {
        Int row[4];  // row[i]: rows i, 4+i
        for (std::size_t i = 0; i < 4; ++i) {
            row[i] = _mm256_set_m128i(load128(p + (4 + i) * stride), load128(p + i * stride));
        }
        const Int a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpacklo_epi32(row[2], row[3]);
        const Int c = _mm256_unpackhi_epi32(row[0], row[1]), d = _mm256_unpackhi_epi32(row[2], row[3]);
        word[0] = _mm256_unpacklo_epi64(a, b);
        word[1] = _mm256_unpackhi_epi64(a, b);
        word[2] = _mm256_unpacklo_epi64(c, d);
        word[3] = _mm256_unpackhi_epi64(c, d);
    }

    static void load_two_words(const std::uint8_t *p, std::size_t stride, Int word[2]) {
        std::int32_t first[width], second[width];
        for (std::size_t r = 0; r < width; ++r) {
            std::memcpy(&first[r], p + r * stride, 4);
            std::memcpy(&second[r], p + r * stride + 4, 4);
        }
        word[0] = _mm256_loadu_si256(reinterpret_cast<const Int *>(first));
        word[1] = _mm256_loadu_si256(reinterpret_cast<const Int *>(second));
    }
};

}  // namespace

const TiledGemm tiled_gemm_avx2 = {Avx2::tile_tokens, pack<Avx2>, multiply<Avx2>};

}  // namespace irq::onnx
