#include "payload.h"

namespace irq {

// Element j of 64 is bits 2 (j % 4) of byte j / 4 in ggml and bits 2 (j / 16) of byte j % 16 here; the value
// d (q - 1) there is scale (code - 2) here, so code = 3 - q and scale = -d.
void repack_q2_0(const std::uint8_t *blocks, std::size_t count, std::uint8_t *codes, std::uint16_t *scales) {
    constexpr std::size_t quarter = 16;  // bytes of codes in a block, and elements in a quarter of it
    for (std::size_t b = 0; b < count; ++b, blocks += 2 + quarter, codes += quarter) {
        scales[b] = static_cast<std::uint16_t>((blocks[0] | blocks[1] << 8) ^ 0x8000);
        const std::uint8_t *packed = blocks + 2;
        for (std::size_t j = 0; j < quarter; ++j) {
            unsigned byte = 0;
            for (std::size_t k = 0; k < 4; ++k) {
                const unsigned q = static_cast<unsigned>(packed[j / 4 + 4 * k]) >> (2 * (j % 4)) & 3U;
                byte |= (3U - q) << (2 * k);
            }
            codes[j] = static_cast<std::uint8_t>(byte);
        }
    }
}

}  // namespace irq
