// irq_runtime._native: numpy in, numpy out. Shapes are checked here, once; kernels trust them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <string>

#include "irq/kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Codes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PerBlock = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Vector = nb::ndarray<nb::numpy, float, nb::ndim<1>>;

irq_codebook codebook_of(const std::string &name) {
    for (int id = 0; id < IRQ_CODEBOOK_COUNT; ++id) {
        if (name == irq_codebook_name[id]) return static_cast<irq_codebook>(id);
    }
    throw nb::value_error(("unknown codebook " + name).c_str());
}

Vector copy_of(const float *values, std::size_t size) {
    auto data = std::make_unique<float[]>(size);
    std::copy_n(values, size, data.get());
    float *raw = data.release();
    return Vector(raw, {size}, nb::capsule(raw, [](void *p) noexcept { delete[] static_cast<float *>(p); }));
}

Vector levels(const std::string &name) {
    switch (codebook_of(name)) {
        case IRQ_NF4: return copy_of(irq_nf4_levels, 16);
        case IRQ_NF3: return copy_of(irq_nf3_levels, 8);
        case IRQ_NF2: return copy_of(irq_nf2_levels, 4);
        case IRQ_INT4: return copy_of(irq_int4_levels, 16);
        case IRQ_INT3: return copy_of(irq_int3_levels, 8);
        case IRQ_INT2: return copy_of(irq_int2_levels, 4);
        default: throw nb::value_error((name + " has no table").c_str());
    }
}

Matrix dequantize(const std::string &name, std::size_t block_size, Codes codes, PerBlock scale,
                  PerBlock tau) {
    const irq_codebook id = codebook_of(name);
    const std::size_t rows = scale.shape(0);
    const irq::BlockShape shape{id, block_size, rows, scale.shape(1) * block_size};
    if (!irq::is_valid(shape) || codes.shape(0) != rows || codes.shape(1) != shape.row_bytes() ||
        tau.shape(0) != rows || tau.shape(1) != scale.shape(1)) {
        throw nb::value_error("codes, scale and tau do not fit together");
    }
    auto data = std::make_unique<float[]>(rows * shape.columns);
    {
        nb::gil_scoped_release unlocked;
        irq::dequantize(shape, codes.data(), scale.data(), tau.data(), data.get());
    }
    float *raw = data.release();
    return Matrix(raw, {rows, shape.columns},
                  nb::capsule(raw, [](void *p) noexcept { delete[] static_cast<float *>(p); }));
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Native kernels of irq_runtime.";
    module.def("levels", &levels, "codebook"_a, "The codebook's float32 levels, as compiled in.");
    module.def(
        "dynamic_map", [] { return copy_of(irq_dynamic_map, 256); }, "The 256 float32 values of dq8, as compiled in.");
    module.def("dequantize", &dequantize, "codebook"_a, "block_size"_a, "codes"_a, "scale"_a, "tau"_a,
               "Decode packed codes uint8 (out, in*bits/8) with float32 scale and tau (out, nb) to float32 "
               "(out, in), bit-equal to irq_formats.codecs.");
}
