// Scales or taus of a matrix in fewer bytes, where that loses nothing.
//
// One token reads every byte of a matrix once, as fast as memory gives them, and 8 bytes of scale and tau a block are a
// fifth of NF4. Exports expand to float what was fp16 (scales) or 8-bit indices (taus): irq-blocks.md, section 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "irq/kernels.h"

namespace irq::onnx {

class NarrowValues {
  public:
    NarrowValues() = default;
    // values (count,): of all blocks of a matrix, in order. Throws std::bad_alloc.
    NarrowValues(const float *values, std::size_t count);

    // The same values bit for bit, or none if they need as many bytes as they had. Not longer than this object lives.
    BlockValues view() const;

  private:
    std::vector<std::uint16_t> halves_;
    std::vector<std::uint8_t> indices_;
    std::vector<float> absmax_;  // one for every 256 indices
};

}  // namespace irq::onnx
