// float to fp16, nearest, ties to even: for outputs of float16 models.
#pragma once

#include <cstddef>
#include <cstdint>

namespace irq::onnx {

void to_halves(const float *values, std::size_t count, std::uint16_t *halves);

}  // namespace irq::onnx
