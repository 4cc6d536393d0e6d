// The kernels of one build behind functions that carry its number; compiled with -Dirq=irq_N -DBUILD=N.
#include "irq/kernels.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

void *JOIN(prepare_, BUILD)(const float *x, std::size_t columns, bool is_fast) {
    auto *input = new irq::Activations(1, columns, is_fast ? irq::Mode::fast : irq::Mode::exact);
    input->prepare(x, columns, 1, columns);
    return input;
}

void JOIN(multiply_, BUILD)(const void *matrix, const void *input, std::size_t r0, std::size_t r1, float *y) {
    irq::gemv(*static_cast<const irq::Matrix *>(matrix), *static_cast<const irq::Activations *>(input), 0, r0, r1, y);
}
