// Half and brain floats in plain C++, exact. Internal linkage on purpose: an inline function that the
// linker may share between files would carry one file's instruction set into another's code.
#pragma once

#include <cstdint>
#include <cstring>

namespace irq {
namespace {

inline float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t bits_of_float(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Moves exponent and fraction into float32's places and multiplies the difference of the biases away,
// which also normalises denormals.
inline float float_of_f16(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    if (magnitude >= 0x7c00u << 13) return float_of_bits(sign | magnitude | 0x7f800000u);  // infinity, NaN
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 0x1p112f));
}

// The nearest fp16, ties to even, widened again. Below 2^-14 the spacing of fp16 is the constant 2^-24:
// adding and subtracting 1.5 * 2^-1 (whose own spacing is 2^-24) rounds to it.
inline float round_to_f16(float value) {
    const std::uint32_t bits = bits_of_float(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    float rounded;
    if (magnitude >= 0x7f800000u) return value;
    if (magnitude < 0x38800000u) {
        rounded = (float_of_bits(magnitude) + 0.75f) - 0.75f;
    } else {
        const std::uint32_t even = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
        rounded = float_of_bits(even > 0x477fe000u ? 0x7f800000u : even);  // above 65504: infinity
    }
    return float_of_bits(sign | bits_of_float(rounded));
}

inline float float_of_bf16(std::uint16_t brain) { return float_of_bits(static_cast<std::uint32_t>(brain) << 16); }

// Loads that need no alignment.
template <class T>
inline T load_as(const void *address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

inline float load_f16(const void *address) { return float_of_f16(load_as<std::uint16_t>(address)); }

}  // namespace
}  // namespace irq
