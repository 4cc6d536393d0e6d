// Holds every instruction set of this machine to the scalar kernels, on random bytes: decoded weights bit
// for bit, products to the rounding of float32 sums. The scalar kernels are held to numpy elsewhere
// (tests/runtime/test_kernels.py, test_blocks.cpp). Needs no files, so it also runs under qemu and sanitizers;
// buffers are of exact size, so that a sanitizer sees one byte too many.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "irq/kernels.h"

namespace {

std::mt19937 random_engine(7);

// Exactly `size` random bytes, on the heap and not aligned.
class RandomBytes {
  public:
    explicit RandomBytes(std::size_t size) : bytes_(new std::uint8_t[size + 1]) {
        for (std::size_t i = 0; i < size + 1; ++i) bytes_[i] = static_cast<std::uint8_t>(random_engine());
    }
    std::uint8_t *data() { return bytes_.get() + 1; }

  private:
    std::unique_ptr<std::uint8_t[]> bytes_;
};

// An fp16 bit pattern of magnitude below 2.
std::uint16_t small_half() { return static_cast<std::uint16_t>(random_engine() & 0xbfff); }

void put_half(std::uint8_t *at) {
    const std::uint16_t half = small_half();
    std::memcpy(at, &half, sizeof half);
}

struct Weight {
    std::string name;
    irq::Matrix matrix;
    RandomBytes data, scale, tau;
    std::vector<float> scale_absmax, tau_absmax;
};

std::size_t bytes_of(irq::Storage storage) { return storage == irq::Storage::f32 ? 4 : storage == irq::Storage::f16 ? 2 : 1; }

void fill(irq::BlockValues &values, irq::Storage storage, RandomBytes &bytes, std::vector<float> &absmax,
          std::size_t blocks) {
    values.storage = storage;
    values.values = storage == irq::Storage::none ? nullptr : bytes.data();
    for (std::size_t i = 0; i < blocks; ++i) {
        const float value = std::ldexp(1.0f + static_cast<float>(random_engine() % 1000), -14);
        if (storage == irq::Storage::f32) std::memcpy(bytes.data() + 4 * i, &value, 4);
        if (storage == irq::Storage::f16) put_half(bytes.data() + 2 * i);
    }
    absmax.assign((blocks + 255) / 256, 0.25f);
    values.absmax = absmax.data();
}

Weight block_weight(irq_codebook codebook, std::size_t block, std::size_t rows, std::size_t blocks_per_row,
                    irq::Storage scale, irq::Storage tau) {
    irq::Matrix w;
    w.format = irq::Format::blocks;
    w.codebook = codebook;
    w.block_size = block;
    w.rows = rows;
    w.columns = blocks_per_row * block;
    const std::size_t blocks = rows * blocks_per_row;
    Weight made{irq_codebook_name[codebook] + ("/" + std::to_string(block)), w, RandomBytes(rows * w.row_bytes()),
                RandomBytes(blocks * bytes_of(scale)), RandomBytes(blocks * bytes_of(tau)), {}, {}};
    made.matrix.data = made.data.data();
    fill(made.matrix.scale, scale, made.scale, made.scale_absmax, blocks);
    made.matrix.scale.offset = 0.3f;
    made.matrix.scale.round_to_f16 = rows % 2 == 0;
    fill(made.matrix.tau, tau, made.tau, made.tau_absmax, blocks);
    return made;
}

Weight stock_weight(irq::Format format, const char *name, std::size_t rows, std::size_t columns) {
    irq::Matrix w = irq::stock_matrix(format, rows, columns, nullptr);
    const std::size_t size = rows * w.row_bytes();
    Weight made{name, w, RandomBytes(size), RandomBytes(1), RandomBytes(1), {}, {}};
    std::uint8_t *bytes = made.data.data();
    const std::size_t step = columns == 0 ? 1 : w.row_bytes() / (columns / w.block_size);
    for (std::size_t i = 0; i < size; i += step) {
        const float value = std::ldexp(static_cast<float>(random_engine() % 2001) - 1000.0f, -10);
        if (format == irq::Format::f32) std::memcpy(bytes + i, &value, 4);
        else if (format == irq::Format::bf16) std::memcpy(bytes + i, reinterpret_cast<const char *>(&value) + 2, 2);
        else put_half(bytes + i);
        if (format == irq::Format::q4_1) put_half(bytes + i + 2);
    }
    made.matrix.data = bytes;
    return made;
}

std::vector<float> decoded(const irq::Matrix &w) {
    std::vector<float> weight(w.rows * w.columns);
    irq::dequantize_rows(w, 0, w.rows, weight.data());
    return weight;
}

std::vector<float> product(const irq::Matrix &w, const std::vector<float> &x, std::size_t tokens, irq::Mode mode) {
    irq::Activations input(tokens, w.columns, mode);
    input.prepare(x.data(), w.columns, tokens, w.columns);
    std::vector<float> y(tokens * w.rows, 1.0f);
    const std::size_t middle = w.rows / 3;
    if (tokens == 1) {
        irq::gemv(w, input, 0, 0, middle, y.data());
        irq::gemv(w, input, 0, middle, w.rows, y.data());
    } else {
        irq::gemm(w, input, 0, middle, y.data(), w.rows);
        irq::gemm(w, input, middle, w.rows, y.data(), w.rows);
    }
    return y;
}

// Mean square of the difference over that of the reference.
double nmse(const std::vector<float> &a, const std::vector<float> &reference) {
    double error = 0, power = 1e-300;
    for (std::size_t i = 0; i < a.size(); ++i) {
        error += std::pow(static_cast<double>(a[i]) - reference[i], 2);
        power += std::pow(static_cast<double>(reference[i]), 2);
    }
    return error / power;
}

void check(const Weight &weight, irq::Isa isa) {
    const irq::Matrix &w = weight.matrix;
    irq::set_active_isa(isa);
    expect(irq::is_valid(w), weight.name + " is valid");
    const std::vector<float> other = decoded(w);
    irq::set_active_isa(irq::Isa::scalar);
    const std::vector<float> reference = decoded(w);
    irq::set_active_isa(isa);
    expect(std::memcmp(other.data(), reference.data(), 4 * other.size()) == 0, weight.name + " weights");
    const bool words = isa == irq::Isa::scalar || isa == irq::Isa::avx2 || isa == irq::Isa::neon;  // in fast mode
    for (const std::size_t tokens : {1, 3, 9, 10, 23}) {
        std::vector<float> x(tokens * w.columns);
        for (float &value : x) value = static_cast<float>(static_cast<int>(random_engine() % 2001) - 1000) / 1000.0f;
        for (const irq::Mode mode : {irq::Mode::exact, irq::Mode::fast}) {
            irq::set_active_isa(isa);
            const std::vector<float> y = product(w, x, tokens, mode);
            irq::set_active_isa(words ? irq::Isa::scalar : irq::Isa::scalar8);
            const std::vector<float> expected = product(w, x, tokens, mode);
            irq::set_active_isa(isa);
            // The integers agree; only the fast gemm of NEON without sdot computes in float32, more exact than the
            // scalar one by the rounding of its inputs (tests/tolerance.py, KERNEL_FAST_NMSE).
            const bool floats = isa == irq::Isa::neon && mode == irq::Mode::fast && tokens > 1;
            // gemv of unsigned bytes takes 128 times the inputs off in float32, up to a hundred times what is left.
            const bool cancels = isa == irq::Isa::avx512 && mode == irq::Mode::fast;
            const double allowed = floats ? 5e-7 : cancels ? 1e-9 : 1e-11;
            expect(nmse(y, expected) <= allowed, weight.name + " times " + std::to_string(tokens) +
                                                     (mode == irq::Mode::exact ? " exact" : " fast"));
        }
    }
}

void check_all(irq::Isa isa) {
    using irq::Storage;
    for (int id = 0; id < IRQ_CODEBOOK_COUNT; ++id) {
        const auto codebook = static_cast<irq_codebook>(id);
        for (const std::size_t block : {std::size_t{32}, std::size_t{64}}) {
            if (codebook == IRQ_INT8 && block == 64) continue;
            const bool plain = codebook == IRQ_INT8;
            check(block_weight(codebook, block, 37, 5, plain ? Storage::f16 : Storage::dq8,
                               plain ? Storage::none : Storage::dq8), isa);
            check(block_weight(codebook, block, 20, 33, Storage::f16, plain ? Storage::none : Storage::f32), isa);
        }
    }
    check(block_weight(IRQ_NF4, 32, 2, 1031, Storage::dq8, Storage::dq8), isa);
    check(stock_weight(irq::Format::f32, "f32", 19, 83), isa);
    check(stock_weight(irq::Format::f16, "f16", 19, 1083), isa);
    check(stock_weight(irq::Format::bf16, "bf16", 19, 83), isa);
    check(stock_weight(irq::Format::q8_0, "q8_0", 19, 96), isa);
    check(stock_weight(irq::Format::q4_0, "q4_0", 19, 1120), isa);
    check(stock_weight(irq::Format::q4_1, "q4_1", 19, 96), isa);
}

}  // namespace

int main() {
    for (const irq::Isa isa : irq::all_isas) {
        if (!irq::isa_supported(isa)) continue;
        std::printf("%s\n", irq::isa_name(isa));
        check_all(isa);
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
