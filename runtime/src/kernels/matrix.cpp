// Views, tables and the public functions: what does not depend on the instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "float16.h"
#include "kernel_table.h"

namespace irq {
namespace {

constexpr float q4_1_levels[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Of levels within -1 to 1 and, for integers, of the levels themselves.
CodeTable code_table(const float *levels, int count, bool is_integer) {
    CodeTable table{{}, is_integer ? 1.0f : 1.0f / largest_weight_code};
    for (int i = 0; i < count; ++i) table.code[i] = static_cast<std::int16_t>(std::lround(levels[i] / table.step));
    return table;
}

constexpr ByteTable byte_tables[] = {
    {{0, 38, 59, 75, 89, 101, 113, 124, 134, 144, 155, 166, 179, 194, 214, 248}, 124, 0.008057192f, -1.0003823f},
    {{0, 62, 93, 119, 138, 159, 186, 238}, 119, 0.008403457f, -0.9992846f},
    {{0, 74, 124, 198}, 99, 0.010101577f, -1.0000561f},
    {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, 8, 1.0f, -8.0f},
    {{0, 1, 2, 3, 4, 5, 6, 7}, 4, 1.0f, -4.0f},
    {{0, 1, 2, 3}, 2, 1.0f, -2.0f},
    {{}, 128, 1.0f, -128.0f},
    {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, 0, 1.0f, 0.0f},  // q4_1
};

const KernelTable &kernels() {
    switch (active_isa()) {
        case Isa::scalar8: return scalar8_kernels;
#if defined(__x86_64__)
        case Isa::avx2: return avx2_kernels;
        case Isa::avx512: return avx512_kernels;
#elif defined(__aarch64__)
        case Isa::neon: return neon_kernels;
        case Isa::dotprod: return dotprod_kernels;
#endif
        default: return scalar_kernels;
    }
}

irq_codebook codebook_of(const Matrix &w) {
    switch (w.format) {
        case Format::q8_0: return IRQ_INT8;
        case Format::q4_0: return IRQ_INT4;
        default: return w.codebook;
    }
}

std::size_t storage_bytes(const BlockValues &values, std::size_t count) {
    switch (values.storage) {
        case Storage::none: return 0;
        case Storage::f32: return 4 * count;
        case Storage::f16: return 2 * count;
        default: return count + 4 * ((count + IRQ_GROUP_SIZE - 1) / IRQ_GROUP_SIZE);
    }
}

bool is_complete(const BlockValues &values) {
    if (values.storage == Storage::none) return true;
    return values.values != nullptr && (values.storage != Storage::dq8 || values.absmax != nullptr);
}

constexpr std::size_t alignment = 64;
constexpr std::size_t padded(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

}  // namespace

const float *levels_of(const Matrix &w) {
    static const float *const levels[] = {irq_nf4_levels,  irq_nf3_levels,  irq_nf2_levels, irq_int4_levels,
                                          irq_int3_levels, irq_int2_levels, nullptr};
    return w.format == Format::q4_1 ? q4_1_levels : levels[codebook_of(w)];
}

const CodeTable &code_table_of(const Matrix &w) {
    static const CodeTable tables[] = {
        code_table(irq_nf4_levels, 16, false), code_table(irq_nf3_levels, 8, false),
        code_table(irq_nf2_levels, 4, false),  code_table(irq_int4_levels, 16, true),
        code_table(irq_int3_levels, 8, true),  code_table(irq_int2_levels, 4, true),
        code_table(nullptr, 0, true),          code_table(q4_1_levels, 16, true),
    };
    return tables[w.format == Format::q4_1 ? IRQ_CODEBOOK_COUNT : codebook_of(w)];
}

const ByteTable &byte_table_of(const Matrix &w) {
    return byte_tables[w.format == Format::q4_1 ? IRQ_CODEBOOK_COUNT : codebook_of(w)];
}

int code_bits(const Matrix &w) { return w.format == Format::q4_1 ? 4 : irq_codebook_bits[codebook_of(w)]; }

const std::uint8_t *dynamic_map_planes() {
    struct Planes {
        alignas(64) std::uint8_t bytes[4][256];
        Planes() {
            for (int i = 0; i < 256; ++i) {
                for (int b = 0; b < 4; ++b) {
                    bytes[b][i] = static_cast<std::uint8_t>(bits_of_float(irq_dynamic_map[i]) >> (8 * b));
                }
            }
        }
    };
    static const Planes planes;
    return &planes.bytes[0][0];
}

bool has_tau(const Matrix &w) {
    return w.format == Format::q4_1 || (w.format == Format::blocks && w.tau.storage != Storage::none);
}

std::size_t Matrix::row_bytes() const {
    switch (format) {
        case Format::f32: return 4 * columns;
        case Format::f16:
        case Format::bf16: return 2 * columns;
        case Format::q8_0: return columns / 32 * 34;
        case Format::q4_0: return columns / 32 * 18;
        case Format::q4_1: return columns / 32 * 20;
        default: return columns * static_cast<std::size_t>(irq_codebook_bits[codebook]) / 8;
    }
}

std::size_t Matrix::total_bytes() const {
    const std::size_t data_bytes = rows * row_bytes();
    if (format != Format::blocks) return data_bytes;
    const std::size_t blocks = rows * blocks_per_row();
    return data_bytes + storage_bytes(scale, blocks) + storage_bytes(tau, blocks);
}

bool is_valid(const Matrix &w) {
    if (w.data == nullptr && w.rows * w.columns != 0) return false;
    switch (w.format) {
        case Format::f32:
        case Format::f16:
        case Format::bf16: return w.block_size == 1;
        case Format::q8_0:
        case Format::q4_0:
        case Format::q4_1: return w.block_size == 32 && w.columns % 32 == 0;
        case Format::blocks: break;
        default: return false;
    }
    if (w.codebook < 0 || w.codebook >= IRQ_CODEBOOK_COUNT) return false;
    const bool size_known = w.block_size == 32 || (w.block_size == 64 && w.codebook != IRQ_INT8);
    if (!size_known || w.columns % w.block_size != 0) return false;
    if (w.codebook == IRQ_INT8 && w.tau.storage != Storage::none) return false;
    return w.scale.storage != Storage::none && is_complete(w.scale) && is_complete(w.tau);
}

Matrix stock_matrix(Format format, std::size_t rows, std::size_t columns, const void *data) {
    Matrix w;
    w.format = format;
    const bool is_float = format == Format::f32 || format == Format::f16 || format == Format::bf16;
    w.block_size = is_float ? 1 : 32;
    w.rows = rows;
    w.columns = columns;
    w.data = data;
    return w;
}

Activations::Activations(std::size_t max_tokens, std::size_t max_columns, Mode mode)
    : max_tokens_(max_tokens), max_stride_(padded(max_columns, 2 * span_size)), mode_(mode) {
    // x, then for every 32 columns a sum, for every 64 a sum; in fast mode scales, starts, codes.
    const std::size_t values = max_tokens * max_stride_;
    const std::size_t groups = padded(values / group_size, 16), spans = padded(values / span_size, 16);
    const bool fast = mode == Mode::fast;
    const std::size_t of_fast = fast ? 4 * (2 * groups + spans) + 4 * values : 0;
    const std::size_t bytes = 4 * (values + groups + spans) + of_fast;
    const std::size_t readable = 16 * sizeof(float);  // behind the last: vectors are read whole
    memory_ = ::operator new(padded(bytes + readable, alignment), std::align_val_t{alignment});
    first_.x = static_cast<float *>(memory_);
    first_.sum = first_.x + values;
    first_.span_sum = first_.sum + groups;
    if (fast) {
        first_.scale = first_.span_sum + spans;
        first_.start = reinterpret_cast<std::int32_t *>(first_.scale + groups);
        first_.span_start = first_.start + groups;
        first_.codes = reinterpret_cast<std::int16_t *>(first_.span_start + spans);
        first_.bytes = reinterpret_cast<std::int8_t *>(first_.codes);
        first_.pairs = first_.bytes + 2 * values;
    }
    // Vectors are read whole, and what an allocator leaves behind may be denormal numbers, which cost a fifth of a gemv.
    std::memset(first_.sum, 0, bytes - 4 * values - (fast ? 4 * values : 0));
}

TokenInput Activations::token(std::size_t t) const {
    const std::size_t value = t * stride_, group = value / group_size, span = value / span_size;
    TokenInput in = first_;
    in.x += value;
    in.sum += group;
    in.span_sum += span;
    if (mode_ == Mode::exact) return in;
    in.scale += group;
    in.start += group;
    in.span_start += span;
    in.codes += value;
    in.bytes += 2 * value;
    in.pairs += 2 * value;
    return in;
}

Activations::~Activations() { ::operator delete(memory_, std::align_val_t{alignment}); }

Activations::Activations(Activations &&other) noexcept { *this = static_cast<Activations &&>(other); }

// Swapping leaves the old memory to the other object's destructor.
Activations &Activations::operator=(Activations &&other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(first_, other.first_);
    std::swap(max_tokens_, other.max_tokens_);
    std::swap(max_stride_, other.max_stride_);
    std::swap(tokens_, other.tokens_);
    std::swap(columns_, other.columns_);
    std::swap(stride_, other.stride_);
    std::swap(mode_, other.mode_);
    return *this;
}

bool Activations::reshape(std::size_t tokens, std::size_t columns) {
    const std::size_t stride = padded(columns, 2 * span_size);
    if (tokens * stride > max_tokens_ * max_stride_) return false;
    tokens_ = tokens;
    columns_ = columns;
    stride_ = stride;
    return true;
}

void Activations::prepare_token(std::size_t t, const float *x) {
    kernels().prepare(x, columns_, stride_, tokens_ <= few_tokens, token(t));
}

bool Activations::prepare(const float *x, std::size_t ldx, std::size_t tokens, std::size_t columns) {
    if (!reshape(tokens, columns)) return false;
    for (std::size_t t = 0; t < tokens; ++t) prepare_token(t, x + t * ldx);
    return true;
}

void dequantize_rows(const Matrix &w, std::size_t r0, std::size_t r1, float *weight) {
    kernels().dequantize_rows(w, r0, r1, weight);
}

void gemv(const Matrix &w, const Activations &x, std::size_t token, std::size_t r0, std::size_t r1, float *y,
          Store store) {
    kernels().gemv(w, x, token, r0, r1, y, store);
}

void gemm(const Matrix &w, const Activations &x, std::size_t r0, std::size_t r1, float *y, std::size_t ldy,
          Store store) {
    kernels().gemm(w, x, r0, r1, y, ldy, store);
}

}  // namespace irq
