#include "halves.h"

#include <cstring>

#include "irq/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace irq::onnx {
namespace {

std::uint16_t to_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // NaN, made quiet
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // from 65520 on: infinity
    } else if (magnitude < 0x38800000u) {  // denormal: adding 0.5 leaves multiples of 2^-24 in the low bits
        float shifted;
        std::memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        std::memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return static_cast<std::uint16_t>(sign | half);
}

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) std::size_t eights_to_halves(const float *values, std::size_t count,
                                                                 std::uint16_t *halves) {
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(halves + i), eight);
    }
    return i;
}
#endif

}  // namespace

void to_halves(const float *values, std::size_t count, std::uint16_t *halves) {
    std::size_t i = 0;
#if defined(__x86_64__)
    if (active_isa() >= Isa::avx2) i = eights_to_halves(values, count, halves);
#endif
    for (; i < count; ++i) halves[i] = to_half(values[i]);
}

}  // namespace irq::onnx
