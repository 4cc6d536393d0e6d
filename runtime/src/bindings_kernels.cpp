// irq_runtime._native.Weight: the kernels one by one, for tests and benchmarks. The engine does not come
// through here. Shapes are checked once, in the constructor; kernels trust them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <time.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "irq/kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Raw = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

template <class T, std::size_t N>
T choice(const char *const (&names)[N], const std::string &name) {
    for (std::size_t i = 0; i < N; ++i) {
        if (name == names[i]) return static_cast<T>(i);
    }
    throw nb::value_error(("unknown name " + name).c_str());
}

irq::Format format_of(const std::string &name) {
    return choice<irq::Format>({"blocks", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"}, name);
}

irq::Mode mode_of(const std::string &name) { return choice<irq::Mode>({"exact", "fast"}, name); }

irq::Isa isa_of(const std::string &name) {
    irq::Isa isa{};
    if (!irq::isa_from_name(name.c_str(), &isa)) throw nb::value_error(("unknown instruction set " + name).c_str());
    return isa;
}

Matrix new_matrix(std::size_t rows, std::size_t columns) {
    auto data = std::make_unique<float[]>(rows * columns);
    float *raw = data.release();
    return Matrix(raw, {rows, columns}, nb::capsule(raw, [](void *p) noexcept { delete[] static_cast<float *>(p); }));
}

double thread_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// A view of numpy arrays, kept alive by their handles.
class Weight {
  public:
    Weight(const std::string &format, const std::string &codebook, std::size_t block_size, std::size_t columns,
           Bytes data)
        : data_(data) {
        if (block_size == 0) throw nb::value_error("blocks of no values");
        w_.format = format_of(format);
        if (w_.format == irq::Format::blocks) {
            w_.codebook = choice<irq_codebook>(irq_codebook_name, codebook);
        }
        w_.block_size = block_size;
        w_.rows = data.shape(0);
        w_.columns = columns;
        w_.data = data.data();
    }

    void set_values(bool tau, const std::string &storage, Raw values, const std::optional<Floats> &absmax,
                    float offset, bool round_to_f16) {
        irq::BlockValues &target = tau ? w_.tau : w_.scale;
        target.storage = choice<irq::Storage>({"none", "f32", "f16", "dq8"}, storage);
        constexpr std::size_t sizes[] = {0, 4, 2, 1};
        const std::size_t blocks = w_.rows * w_.blocks_per_row();
        const std::size_t groups = (blocks + IRQ_GROUP_SIZE - 1) / IRQ_GROUP_SIZE;
        const bool fits = values.shape(0) == blocks * sizes[static_cast<int>(target.storage)];
        if (!fits || (absmax && absmax->shape(0) != groups)) throw nb::value_error("values do not fit the blocks");
        (tau ? tau_ : scale_) = values;
        (tau ? tau_absmax_ : scale_absmax_) = absmax;
        target.values = values.data();
        target.absmax = absmax ? absmax->data() : nullptr;
        target.offset = offset;
        target.round_to_f16 = round_to_f16;
    }

    Matrix dequantize() const {
        check();
        Matrix weight = new_matrix(w_.rows, w_.columns);
        nb::gil_scoped_release unlocked;
        irq::dequantize_rows(w_, 0, w_.rows, weight.data());
        return weight;
    }

    // y (tokens, rows) = x (tokens, columns) W^T, in `parts` ranges of rows; gemv for one token.
    Matrix matmul(Inputs x, const std::string &mode, std::size_t parts, std::optional<Inputs> add_to) const {
        check();
        if (x.shape(1) != w_.columns) throw nb::value_error("x has other columns than the weight");
        const std::size_t tokens = x.shape(0);
        Matrix y = new_matrix(tokens, w_.rows);
        const irq::Store store = add_to ? irq::Store::add : irq::Store::set;
        if (add_to) {
            if (add_to->shape(0) != tokens || add_to->shape(1) != w_.rows) throw nb::value_error("add_to does not fit");
            std::copy_n(add_to->data(), tokens * w_.rows, y.data());
        }
        irq::Activations input(tokens, w_.columns, mode_of(mode));
        nb::gil_scoped_release unlocked;
        input.prepare(x.data(), w_.columns, tokens, w_.columns);
        for (std::size_t i = 0; i < parts; ++i) {
            multiply(input, w_.rows * i / parts, w_.rows * (i + 1) / parts, y.data(), store);
        }
        return y;
    }

    // Processor seconds of `repeats` products in a row, of `tokens` inputs, for each thread its share of the
    // rows. Not wall-clock seconds: on a shared machine those measure the neighbours.
    std::vector<double> time(std::size_t tokens, const std::string &mode, std::size_t repeats, std::size_t threads) const {
        check();
        std::vector<float> x(tokens * w_.columns), y(tokens * w_.rows);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.0f;
        irq::Activations input(tokens, w_.columns, mode_of(mode));
        input.prepare(x.data(), w_.columns, tokens, w_.columns);
        std::vector<double> seconds(threads);
        nb::gil_scoped_release unlocked;
        std::vector<std::thread> pool;
        for (std::size_t i = 0; i < threads; ++i) {
            pool.emplace_back([&, i] {
                const double start = thread_seconds();
                for (std::size_t n = 0; n < repeats; ++n) {
                    multiply(input, w_.rows * i / threads, w_.rows * (i + 1) / threads, y.data(), irq::Store::set);
                }
                seconds[i] = thread_seconds() - start;
            });
        }
        for (std::thread &thread : pool) thread.join();
        return seconds;
    }

    std::size_t nbytes() const { return w_.total_bytes(); }

  private:
    void check() const {
        if (!irq::is_valid(w_) || data_.shape(1) != w_.row_bytes()) throw nb::value_error("codes, scale and tau do not fit together");
    }

    void multiply(const irq::Activations &x, std::size_t r0, std::size_t r1, float *y, irq::Store store) const {
        if (x.tokens() == 1) irq::gemv(w_, x, 0, r0, r1, y, store);
        else irq::gemm(w_, x, r0, r1, y, w_.rows, store);
    }

    irq::Matrix w_;
    Bytes data_;
    Raw scale_, tau_;
    std::optional<Floats> scale_absmax_, tau_absmax_;
};

}  // namespace

void bind_kernels(nb::module_ &module) {
    module.def("isa", [] { return std::string(irq::isa_name(irq::active_isa())); }, "The instruction set in use.");
    module.def("isa_supported", [](const std::string &name) { return irq::isa_supported(isa_of(name)); }, "name"_a);
    module.def("set_isa", [](const std::string &name) { return irq::set_active_isa(isa_of(name)); }, "name"_a,
               "Force an instruction set; False if this machine has it not.");
    nb::class_<Weight>(module, "Weight", "A weight matrix as the kernels see it: a view of arrays.")
        .def(nb::init<const std::string &, const std::string &, std::size_t, std::size_t, Bytes>(), "format"_a,
             "codebook"_a, "block_size"_a, "columns"_a, "data"_a)
        .def("set_values", &Weight::set_values, "tau"_a, "storage"_a, "values"_a, "absmax"_a.none(), "offset"_a = 0.0f,
             "round_to_f16"_a = false)
        .def("dequantize", &Weight::dequantize)
        .def("matmul", &Weight::matmul, "x"_a, "mode"_a, "parts"_a = 1, "add_to"_a.none() = nb::none())
        .def("time", &Weight::time, "tokens"_a, "mode"_a, "repeats"_a, "threads"_a = 1)
        .def_prop_ro("nbytes", &Weight::nbytes, "Bytes of codes, scales and offsets.");
}
