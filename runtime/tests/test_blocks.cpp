// Holds the scalar kernel to the golden vectors of formats/vectors/blocks, bit for bit.
//   test_blocks DIRECTORY   (layout of a vector file: formats/vectors/README.md)
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "irq/kernels.h"

namespace {

struct Header {
    char magic[4];
    std::uint32_t version, codebook, block_size, rows, columns;
    std::uint32_t codes_offset, scale_offset, tau_offset, weight_offset;
};

bool check(const std::filesystem::path &path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    Header h{};
    if (bytes.size() < sizeof h) return false;
    std::memcpy(&h, bytes.data(), sizeof h);
    const irq::BlockShape shape{static_cast<irq_codebook>(h.codebook), h.block_size, h.rows, h.columns};
    const std::size_t blocks = shape.rows * shape.blocks_per_row();
    const std::size_t weights = shape.rows * shape.columns;
    if (std::memcmp(h.magic, "IRQV", 4) != 0 || h.version != 1 || !irq::is_valid(shape) ||
        h.codes_offset + shape.rows * shape.row_bytes() > bytes.size() ||
        h.scale_offset + 4 * blocks > bytes.size() || h.tau_offset + 4 * blocks > bytes.size() ||
        h.weight_offset + 4 * weights > bytes.size()) {
        return false;
    }
    std::vector<float> scale(blocks), tau(blocks), weight(weights);
    std::memcpy(scale.data(), bytes.data() + h.scale_offset, 4 * blocks);
    std::memcpy(tau.data(), bytes.data() + h.tau_offset, 4 * blocks);
    irq::dequantize(shape, reinterpret_cast<const std::uint8_t *>(bytes.data()) + h.codes_offset,
                    scale.data(), tau.data(), weight.data());
    return std::memcmp(weight.data(), bytes.data() + h.weight_offset, 4 * weights) == 0;
}

}  // namespace

int main(int argc, char **argv) {
    int cases = 0, failed = 0;
    for (const auto &entry : std::filesystem::directory_iterator(argc > 1 ? argv[1] : ".")) {
        if (entry.path().extension() != ".bin") continue;
        ++cases;
        if (!check(entry.path())) {
            ++failed;
            std::fprintf(stderr, "FAILED %s\n", entry.path().c_str());
        }
    }
    std::printf("%d vectors, %d failed\n", cases, failed);
    return cases > 0 && failed == 0 ? 0 : 1;
}
