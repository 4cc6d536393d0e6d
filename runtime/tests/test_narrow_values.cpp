// Scales and taus in fewer bytes: every value comes back bit for bit, or none is narrowed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../src/kernels/float16.h"
#include "../src/onnx/narrow_values.h"
#include "check.h"
#include "irq/codebooks.h"

namespace {

using irq::BlockValues;
using irq::Storage;

float value_of(const BlockValues &v, std::size_t i) {
    switch (v.storage) {
        case Storage::f16: return irq::float_of_f16(static_cast<const std::uint16_t *>(v.values)[i]);
        default: break;
    }
    return irq_dynamic_map[static_cast<const std::uint8_t *>(v.values)[i]] * v.absmax[i / IRQ_GROUP_SIZE] + v.offset;
}

void check_storage(const std::vector<float> &values, Storage expected, const std::string &what) {
    const irq::onnx::NarrowValues narrow(values.data(), values.size());
    const BlockValues view = narrow.view();
    expect(view.storage == expected, what + ": storage");
    if (view.storage == Storage::none) return;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const float value = value_of(view, i);
        if (std::memcmp(&value, &values[i], sizeof value) != 0) return expect(false, what + ": a value");
    }
}

std::vector<float> halves(std::size_t count) {
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i) {
        values[i] = irq::float_of_f16(static_cast<std::uint16_t>(i * 40503 % 0x7c00));
    }
    return values;
}

// Groups as an exporter makes them: the value that gave absmax has index 255, or 0 if it was negative.
std::vector<float> indexed(std::size_t count, std::mt19937 &random) {
    std::uniform_int_distribution<std::size_t> any(1, 254);
    std::uniform_real_distribution<float> scale(1e-6f, 1e-2f);
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; i += IRQ_GROUP_SIZE) {
        const float absmax = scale(random);
        const std::size_t end = std::min<std::size_t>(count, i + IRQ_GROUP_SIZE);
        for (std::size_t k = i; k < end; ++k) values[k] = irq_dynamic_map[any(random)] * absmax + 0.0f;
        values[i + random() % (end - i)] = irq_dynamic_map[random() % 2 == 0 ? 0 : 255] * absmax;
    }
    return values;
}

}  // namespace

int main() {
    std::mt19937 random(7);
    check_storage(halves(31744), Storage::f16, "every finite fp16 from 0 on");
    check_storage({-1.5f, -0.0f, 65504.0f, 0x1p-24f, INFINITY}, Storage::f16, "unusual fp16");
    for (std::size_t count : {1u, 255u, 256u, 257u, 5184u, 65536u}) {
        const std::string what = std::to_string(count) + " indices";
        for (int i = 0; i < 20; ++i) check_storage(indexed(count, random), Storage::dq8, what);
    }
    std::vector<float> some = indexed(600, random);
    std::fill(some.begin() + IRQ_GROUP_SIZE, some.begin() + 2 * IRQ_GROUP_SIZE, 0.0f);
    check_storage(some, Storage::dq8, "a group of zeros");
    some[300] = -0.0f;
    check_storage(some, Storage::none, "a negative zero");
    for (const float odd : {INFINITY, 1e-40f, 0.3f}) {
        some = indexed(600, random);
        some[599] = odd;
        check_storage(some, Storage::none, "one value that no index has");
    }
    some = indexed(600, random);
    some[3] = std::numeric_limits<float>::quiet_NaN();
    check_storage(some, Storage::none, "not a number");
    std::normal_distribution<float> normal(0, 0.01f);
    for (float &value : some) value = normal(random);
    check_storage(some, Storage::none, "any values");
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
