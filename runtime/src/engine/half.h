// IEEE half precision in software, for what is converted once. Static, not inline: files compiled for other
// instruction sets include this, and the linker must not choose one of theirs for all.
#pragma once

#include <cstdint>
#include <cstring>

namespace irq {

static inline float from_half(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000U) << 16;
    const std::uint32_t magnitude = half & 0x7fffU;
    std::uint32_t bits;
    if (magnitude >= 0x7c00U) {  // infinity, NaN
        bits = 0x7f800000U | (magnitude & 0x3ffU) << 13;
    } else if (magnitude >= 0x400U) {
        bits = (magnitude << 13) + (112U << 23);
    } else {  // subnormal: exact as magnitude * 2^-24
        const float value = static_cast<float>(magnitude) * 0x1p-24F;
        std::memcpy(&bits, &value, sizeof bits);
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest, ties to even; beyond the range infinity.
static inline std::uint16_t to_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000U);
    bits &= 0x7fffffffU;
    if (bits >= 0x7f800000U) return static_cast<std::uint16_t>(sign | (bits > 0x7f800000U ? 0x7e00U : 0x7c00U));
    if (bits >= 0x477ff000U) return static_cast<std::uint16_t>(sign | 0x7c00U);
    if (bits < 0x38800000U) {  // below the normal range: let the FPU round at 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5F;  // ulp of [0.5, 1) is 2^-24
        std::memcpy(&bits, &magnitude, sizeof bits);
        return static_cast<std::uint16_t>(sign | (bits - 0x3f000000U));
    }
    bits += 0xfffU + (bits >> 13 & 1U);
    return static_cast<std::uint16_t>(sign | (bits - (112U << 23)) >> 13);
}

}  // namespace irq
