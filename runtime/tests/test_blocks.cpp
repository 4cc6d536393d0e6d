// Holds every instruction set of this machine to the golden vectors of formats/vectors/blocks, bit for bit.
//   test_blocks DIRECTORY   (layout of a vector file: formats/README.md)
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
    const char *data = bytes.data();
    irq::Matrix w;
    w.format = irq::Format::blocks;
    w.codebook = static_cast<irq_codebook>(h.codebook);
    w.block_size = h.block_size;
    w.rows = h.rows;
    w.columns = h.columns;
    w.data = data + h.codes_offset;
    w.scale = {irq::Storage::f32, data + h.scale_offset, nullptr, 0.0f, false};
    if (w.codebook != IRQ_INT8) w.tau = {irq::Storage::f32, data + h.tau_offset, nullptr, 0.0f, false};
    if (std::memcmp(h.magic, "IRQV", 4) != 0 || h.version != 1 || !irq::is_valid(w)) return false;
    const std::size_t blocks = w.rows * w.blocks_per_row(), weights = w.rows * w.columns;
    if (h.codes_offset + w.rows * w.row_bytes() > bytes.size() || h.scale_offset + 4 * blocks > bytes.size() ||
        h.tau_offset + 4 * blocks > bytes.size() || h.weight_offset + 4 * weights > bytes.size()) {
        return false;
    }
    std::vector<float> weight(weights);
    irq::dequantize_rows(w, 0, w.rows, weight.data());
    return std::memcmp(weight.data(), data + h.weight_offset, 4 * weights) == 0;
}

}  // namespace

int main(int argc, char **argv) {
    int cases = 0, failed = 0;
    for (const irq::Isa isa : irq::all_isas) {
        if (!irq::set_active_isa(isa)) continue;
        for (const auto &entry : std::filesystem::directory_iterator(argc > 1 ? argv[1] : ".")) {
            if (entry.path().extension() != ".bin") continue;
            ++cases;
            if (!check(entry.path())) {
                ++failed;
                std::fprintf(stderr, "FAILED %s on %s\n", entry.path().c_str(), irq::isa_name(isa));
            }
        }
    }
    std::printf("%d vectors, %d failed\n", cases, failed);
    return cases > 0 && failed == 0 ? 0 : 1;
}
