#include "utf8.h"

namespace irq {

bool is_utf8(const std::uint8_t *bytes, std::size_t size) {
    std::size_t i = 0;
    while (i < size) {
        const std::uint8_t lead = bytes[i++];
        if (lead < 0x80) continue;
        if (lead < 0xc2 || lead > 0xf4) return false;
        const std::size_t more = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        if (more > size - i) return false;
        const std::uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;   // of the second byte
        const std::uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
        if (bytes[i] < low || bytes[i] > high) return false;
        for (std::size_t k = 1; k < more; ++k) {
            if ((bytes[i + k] & 0xc0) != 0x80) return false;
        }
        i += more;
    }
    return true;
}

}  // namespace irq
