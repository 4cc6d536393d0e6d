// irq_runtime._native: the compiled-in constants, and the parts of the other binding files.
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

}  // namespace

void bind_engine(nb::module_ &module);   // bindings_engine.cpp
void bind_icq(nb::module_ &module);      // bindings_icq.cpp
void bind_kernels(nb::module_ &module);  // bindings_kernels.cpp

NB_MODULE(_native, module) {
    bind_engine(module);
    bind_icq(module);
    bind_kernels(module);
    module.doc() = "Native kernels of irq_runtime.";
    module.def("levels", &levels, "codebook"_a, "The codebook's float32 levels, as compiled in.");
    module.def(
        "dynamic_map", [] { return copy_of(irq_dynamic_map, 256); }, "The 256 float32 values of dq8, as compiled in.");
}
