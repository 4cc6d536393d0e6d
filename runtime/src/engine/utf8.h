#pragma once

#include <cstddef>
#include <cstdint>

namespace irq {

// True for well-formed UTF-8 (Unicode 15, table 3-7): no overlong forms, surrogates or values above U+10FFFF.
bool is_utf8(const std::uint8_t *bytes, std::size_t size);

}  // namespace irq
