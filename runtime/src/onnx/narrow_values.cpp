#include "narrow_values.h"

#include <algorithm>
#include <cmath>

#include "../kernels/float16.h"
#include "halves.h"
#include "irq/codebooks.h"

namespace irq::onnx {
namespace {

bool are_equal(float a, float b) { return bits_of_float(a) == bits_of_float(b); }

// False if a value is no fp16.
bool encode_halves(const float *values, std::size_t count, std::uint16_t *halves) {
    for (std::size_t i = 0; i < count; i += IRQ_GROUP_SIZE) {
        const std::size_t end = std::min(count, i + IRQ_GROUP_SIZE);
        to_halves(values + i, end - i, halves + i);
        for (std::size_t k = i; k < end; ++k) {
            if (!are_equal(float_of_f16(halves[k]), values[k])) return false;
        }
    }
    return true;
}

float decode_index(std::size_t index, float absmax) { return irq_dynamic_map[index] * absmax + 0.0f; }

// False if absmax is not that of the group.
bool encode_indices(const float *values, std::size_t count, float absmax, std::uint8_t *indices) {
    const float *const map = irq_dynamic_map, *const end = map + 256;
    for (std::size_t i = 0; i < count; ++i) {
        const float wanted = absmax == 0 ? 0.0f : values[i] / absmax;  // rounded: the entry itself or a neighbour of it
        const auto above = static_cast<std::size_t>(std::lower_bound(map, end, wanted) - map);
        std::size_t index = std::min<std::size_t>(above, 255);
        if (!are_equal(decode_index(index, absmax), values[i]) && index > 0) --index;
        if (!are_equal(decode_index(index, absmax), values[i])) return false;
        indices[i] = static_cast<std::uint8_t>(index);
    }
    return true;
}

// The largest magnitude is that of index 255 (1) or of 0 and 254 (-0.993 and 0.993): absmax but for its last bits.
bool encode_group(const float *values, std::size_t count, std::uint8_t *indices, float *absmax) {
    float top = 0;
    for (std::size_t i = 0; i < count; ++i) top = std::max(top, std::fabs(values[i]));
    if (!std::isfinite(top)) return false;
    for (const std::size_t index : {255, 254}) {
        float candidate = top / irq_dynamic_map[index];
        for (int i = 0; i < 2; ++i) candidate = std::nextafter(candidate, 0.0f);
        for (int i = 0; i < 5; ++i, candidate = std::nextafter(candidate, INFINITY)) {
            if (decode_index(index, candidate) != top || !encode_indices(values, count, candidate, indices)) continue;
            *absmax = candidate;
            return true;
        }
    }
    return false;
}

}  // namespace

NarrowValues::NarrowValues(const float *values, std::size_t count) {
    halves_.resize(count);
    if (encode_halves(values, count, halves_.data())) return;
    halves_ = {};
    indices_.resize(count);
    absmax_.resize((count + IRQ_GROUP_SIZE - 1) / IRQ_GROUP_SIZE);
    for (std::size_t i = 0, group = 0; i < count; i += IRQ_GROUP_SIZE, ++group) {
        const std::size_t n = std::min<std::size_t>(IRQ_GROUP_SIZE, count - i);
        if (encode_group(values + i, n, indices_.data() + i, &absmax_[group])) continue;
        indices_ = {};
        absmax_ = {};
        return;
    }
}

BlockValues NarrowValues::or_else(const BlockValues &wide) const {
    if (!halves_.empty()) return {Storage::f16, halves_.data()};
    if (!indices_.empty()) return {Storage::dq8, indices_.data(), absmax_.data()};
    return wide;
}

}  // namespace irq::onnx
