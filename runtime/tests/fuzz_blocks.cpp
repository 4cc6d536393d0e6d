// libFuzzer target: any bytes as a weight decode to the same bits on every instruction set, NaN for NaN, and
// any inputs can be multiplied with it. Buffers have exactly the size the kernels may read.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "irq/kernels.h"

namespace {

// Takes bytes from the input; beyond its end there are zeros.
class Input {
public:
    Input(const std::uint8_t *data, std::size_t size) : data_(data), left_(size) {}

    std::size_t below(std::size_t limit) {
        std::uint8_t byte = 0;
        fill(&byte, 1);
        return byte % limit;
    }

    void fill(void *to, std::size_t size) {
        const std::size_t count = std::min(size, left_);
        if (count != 0) std::memcpy(to, data_, count);
        data_ += count;
        left_ -= count;
    }

    template <typename T>
    std::unique_ptr<T[]> array(std::size_t count) {
        auto values = std::make_unique<T[]>(count);
        fill(values.get(), count * sizeof(T));
        return values;
    }

private:
    const std::uint8_t *data_;
    std::size_t left_;
};

struct Part {
    std::unique_ptr<std::uint8_t[]> values;
    std::unique_ptr<float[]> absmax;
};

Part fill(irq::BlockValues &part, irq::Storage storage, std::size_t count, Input &input) {
    static constexpr std::size_t bytes[] = {0, 4, 2, 1};  // by Storage
    Part memory{input.array<std::uint8_t>(count * bytes[static_cast<int>(storage)]), nullptr};
    part.storage = storage;
    if (storage != irq::Storage::none) part.values = memory.values.get();
    if (storage == irq::Storage::dq8) {
        memory.absmax = input.array<float>((count + IRQ_GROUP_SIZE - 1) / IRQ_GROUP_SIZE);
        part.absmax = memory.absmax.get();
        input.fill(&part.offset, sizeof part.offset);
        part.round_to_f16 = input.below(2) != 0;
    }
    return memory;
}

void require_equal(const std::vector<float> &a, const std::vector<float> &b, irq::Isa isa) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        const bool both_nan = a[i] != a[i] && b[i] != b[i];
        if (both_nan || std::memcmp(&a[i], &b[i], sizeof(float)) == 0) continue;
        std::fprintf(stderr, "weight %zu on %s: %a, scalar %a\n", i, irq::isa_name(isa), static_cast<double>(b[i]),
                     static_cast<double>(a[i]));
        std::abort();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    Input input(data, size);
    irq::Matrix w;
    w.format = static_cast<irq::Format>(input.below(7));
    w.codebook = static_cast<irq_codebook>(input.below(IRQ_CODEBOOK_COUNT));
    const bool is_blocks = w.format == irq::Format::blocks;
    const bool is_float = w.format == irq::Format::f32 || w.format == irq::Format::f16 || w.format == irq::Format::bf16;
    const std::size_t wide = input.below(2);
    w.block_size = is_float ? 1 : is_blocks && wide && w.codebook != IRQ_INT8 ? 64 : 32;
    w.rows = 1 + input.below(40);
    w.columns = (1 + input.below(6)) * (is_float ? 13 : w.block_size);
    const std::size_t tokens = 1 + input.below(9);
    const auto storage = [&input](std::size_t none) { return static_cast<irq::Storage>(1 - none + input.below(3 + none)); };
    const irq::Storage scale = storage(0), tau = storage(1);
    auto x = input.array<float>(tokens * w.columns);
    const auto bytes = input.array<std::uint8_t>(w.rows * w.row_bytes());
    w.data = bytes.get();
    Part parts[2];
    if (is_blocks) {
        const std::size_t blocks = w.rows * w.blocks_per_row();
        parts[0] = fill(w.scale, scale, blocks, input);
        if (w.codebook != IRQ_INT8) parts[1] = fill(w.tau, tau, blocks, input);
    }
    if (!irq::is_valid(w)) std::abort();

    const irq::Isa before = irq::active_isa();
    std::vector<float> reference, weight(w.rows * w.columns), y(tokens * w.rows);
    for (const irq::Isa isa : irq::all_isas) {
        if (!irq::set_active_isa(isa)) continue;
        irq::dequantize_rows(w, 0, w.rows, weight.data());
        if (reference.empty()) reference = weight;
        require_equal(reference, weight, isa);
        for (const irq::Mode mode : {irq::Mode::exact, irq::Mode::fast}) {
            irq::Activations activations(tokens, w.columns, mode);
            activations.prepare(x.get(), w.columns, tokens, w.columns);
            irq::gemv(w, activations, tokens - 1, 0, w.rows, y.data());
            irq::gemm(w, activations, 0, w.rows, y.data(), w.rows);
        }
    }
    irq::set_active_isa(before);
    return 0;
}
