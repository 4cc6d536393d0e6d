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

// The index of a map entry, from the upper half of its bits or of a neighbour's: no two entries have the same.
class Guesses {
  public:
    Guesses() {
        for (std::uint32_t half = 0; half < halves; ++half) {
            const float middle = float_of_bits(half << 16 | 0x8000u);
            const float *const entry = std::lower_bound(irq_dynamic_map, irq_dynamic_map + 255, middle);
            index_[half] = static_cast<std::uint8_t>(entry - irq_dynamic_map);
        }
    }
    std::size_t operator()(float value) const { return index_[bits_of_float(value) >> 16]; }

  private:
    static constexpr std::uint32_t halves = 1u << 16;
    std::vector<std::uint8_t> index_ = std::vector<std::uint8_t>(halves);
};

// False if absmax is not that of the group.
bool encode_indices(const float *values, std::size_t count, float absmax, const Guesses &guess, std::uint8_t *indices) {
    const float rate = absmax == 0 ? 0.0f : 1.0f / absmax;
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t near = guess(values[i] * rate);
        const std::size_t tries[] = {near, near - (near > 0), near + (near < 255)};
        const std::size_t *found = tries, *const none = tries + 3;
        while (found != none && !are_equal(decode_index(*found, absmax), values[i])) ++found;
        if (found == none) return false;
        indices[i] = static_cast<std::uint8_t>(*found);
    }
    return true;
}

// The largest magnitude is that of index 255 (1) or of 0 and 254 (-0.993 and 0.993): absmax but for its last bits.
bool encode_group(const float *values, std::size_t count, const Guesses &guess, std::uint8_t *indices, float *absmax) {
    float top = 0;
    for (std::size_t i = 0; i < count; ++i) top = std::max(top, std::fabs(values[i]));
    if (!std::isfinite(top)) return false;
    for (const std::size_t index : {255, 254}) {
        float candidate = top / irq_dynamic_map[index];
        for (int i = 0; i < 2; ++i) candidate = std::nextafter(candidate, 0.0f);
        for (int i = 0; i < 5; ++i, candidate = std::nextafter(candidate, INFINITY)) {
            if (decode_index(index, candidate) != top ||
                !encode_indices(values, count, candidate, guess, indices)) {
                continue;
            }
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
    static const Guesses guess;
    indices_.resize(count);
    absmax_.resize((count + IRQ_GROUP_SIZE - 1) / IRQ_GROUP_SIZE);
    for (std::size_t i = 0, group = 0; i < count; i += IRQ_GROUP_SIZE, ++group) {
        const std::size_t n = std::min<std::size_t>(IRQ_GROUP_SIZE, count - i);
        if (encode_group(values + i, n, guess, indices_.data() + i, &absmax_[group])) continue;
        indices_ = {};
        absmax_ = {};
        return;
    }
}

BlockValues NarrowValues::view() const {
    if (!halves_.empty()) return {Storage::f16, halves_.data()};
    if (!indices_.empty()) return {Storage::dq8, indices_.data(), absmax_.data()};
    return {};
}

}  // namespace irq::onnx
