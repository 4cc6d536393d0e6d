#include "matmul_blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "halves.h"
#include "row_gemv.h"
#include "tiled_gemm.h"

namespace irq::onnx {
namespace {

constexpr std::size_t few_tokens = 8;  // up to here the row-wise kernels are faster
constexpr std::size_t tokens_per_task = 2;
constexpr std::size_t rows_per_panel_task = 64;
constexpr std::size_t products_per_task = std::size_t{1} << 18;  // multiplications: some microseconds
constexpr std::size_t least_at_a_time = std::size_t{1} << 14;    // bytes of codes, one token: a microsecond
constexpr std::size_t most_at_a_time = std::size_t{1} << 17;     // some microseconds
constexpr std::size_t flipped_bytes = std::size_t{1} << 16;      // INT8 codes that a task flips at a time

[[noreturn]] void refuse(irq_codebook codebook, const std::string &what) {
    std::string kind = irq_codebook_name[codebook];
    for (char &c : kind) c = static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
    throw Refusal(ORT_INVALID_ARGUMENT, "irq::MatMulBlocks" + kind + ": " + what);
}

// Messages become strings of Python, which are UTF-8.
std::string printable(std::string text) {
    for (char &c : text) c = c >= ' ' && c <= '~' ? c : '?';
    return text;
}

// Attribute `name` as a size.
std::size_t size_attribute(const Ort &ort, const OrtKernelInfo *info, irq_codebook codebook, const char *name) {
    const std::int64_t value = ort.attribute_int(info, name);
    if (value < 1 || value > std::numeric_limits<std::int32_t>::max()) {
        refuse(codebook, std::string(name) + " must be between 1 and 2147483647, got " + std::to_string(value));
    }
    return static_cast<std::size_t>(value);
}

Shape shape_of(std::initializer_list<std::size_t> sizes) { return Shape(sizes.begin(), sizes.end()); }

Shape codes_shape(const Matrix &w) {
    const std::size_t bytes = w.row_bytes(), nb = w.blocks_per_row();
    if (w.codebook == IRQ_NF4) return shape_of({w.rows, bytes});
    return shape_of({w.rows, nb, bytes / nb});
}

// A block's inputs in the order in which the kernels meet its weights. Two weights share a byte: ONNX puts
// neighbours there, the kernels expect weights that are half a block apart.
//   INT4: low nibble e[2j], high e[2j+1];  NF4: high nibble e[2j], low e[2j+1]
void permute(const Matrix &w, const float *x, float *permuted) {
    const std::size_t half = w.block_size / 2, first = w.codebook == IRQ_NF4 ? 1 : 0;
    for (std::size_t i = 0; i < w.columns; i += w.block_size) {
        for (std::size_t j = 0; j < half; ++j) {
            permuted[i + j] = x[i + 2 * j + first];
            permuted[i + half + j] = x[i + 2 * j + 1 - first];
        }
    }
}

bool is_permuted(const Matrix &w) { return w.codebook == IRQ_NF4 || w.codebook == IRQ_INT4; }

// Rows [r0, r1) of w as a matrix of their own.
Matrix rows_of(const Matrix &w, std::size_t r0, std::size_t r1) {
    Matrix part = w;
    const std::size_t first_block = r0 * w.blocks_per_row();
    part.rows = r1 - r0;
    part.data = static_cast<const std::uint8_t *>(w.data) + r0 * w.row_bytes();
    for (BlockValues *v : {&part.scale, &part.tau}) {
        if (v->storage == Storage::none) continue;
        const std::size_t size = v->storage == Storage::f16 ? 2 : 4;
        v->values = static_cast<const std::uint8_t *>(v->values) + size * first_block;
    }
    return part;
}

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

void flip_top_bits(const std::uint8_t *codes, std::size_t count, std::uint8_t *flipped) {
    std::uint64_t word;
    for (std::size_t i = 0; i < count; i += sizeof word) {
        std::memcpy(&word, codes + i, sizeof word);
        word ^= 0x8080808080808080u;
        std::memcpy(flipped + i, &word, sizeof word);
    }
}

// INT8: the kernels read two's complement, so some rows at a time have their top bits flipped.
bool multiply_flipped(const Matrix &w, const Activations &inputs, std::size_t r0, std::size_t r1, float *result) {
    const std::size_t step = std::max<std::size_t>(1, flipped_bytes / w.columns);
    const std::unique_ptr<std::uint8_t[]> flipped(new (std::nothrow) std::uint8_t[step * w.columns]);
    if (flipped == nullptr) return false;
    for (std::size_t r = r0; r < r1; r += step) {
        Matrix part = rows_of(w, r, std::min(r + step, r1));
        flip_top_bits(static_cast<const std::uint8_t *>(part.data), part.rows * w.columns, flipped.get());
        part.data = flipped.get();
        gemm(part, inputs, 0, part.rows, result + r, w.rows);
    }
    return true;
}

}  // namespace

MatMulBlocks::MatMulBlocks(const Ort &ort, const OrtKernelInfo *info, irq_codebook codebook,
                           ONNXTensorElementDataType type)
    : ort_(ort), type_(type) {
    const std::string name = ort.attribute_string(info, "codebook");
    if (name != irq_codebook_name[codebook]) {
        refuse(codebook, "attribute codebook must be \"" + std::string(irq_codebook_name[codebook]) + "\", got \"" +
                             printable(name.substr(0, 32)) + "\"");
    }
    shape_.format = Format::blocks;
    shape_.codebook = codebook;
    shape_.rows = size_attribute(ort, info, codebook, "N");
    shape_.columns = size_attribute(ort, info, codebook, "K");
    shape_.block_size = size_attribute(ort, info, codebook, "block_size");
    const std::size_t b = shape_.block_size;
    if (b != 32 && (b != 64 || codebook == IRQ_INT8)) {
        refuse(codebook, std::string("block_size must be ") + (codebook == IRQ_INT8 ? "" : "64 or ") + "32, got " +
                             std::to_string(b));
    }
    if (shape_.columns % b != 0) {
        refuse(codebook, "K = " + std::to_string(shape_.columns) + " is not a multiple of block_size = " +
                             std::to_string(b));
    }
    Tensor tensor{};
    if (!ort.constant_input(info, input_codes, &tensor)) {
        refuse(codebook, "input codes must be a constant of the model (an initialiser that is not a graph input)");
    }
    const Shape expected = codes_shape(shape_);
    if (tensor.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 || tensor.shape != expected) {
        refuse(codebook, "codes must be uint8 " + text_of(expected) + ", got " + text_of(tensor.shape));
    }
    is_checked_[input_codes] = true;
    for (const Input input : {input_scale, input_tau}) {
        if (!ort.constant_input(info, input, &tensor)) continue;
        check_values(tensor, input);
        is_checked_[input] = true;
        if (is_half() || row_gemv_for(shape_) == nullptr) continue;
        NarrowValues &narrow = input == input_scale ? scale_ : tau_;
        narrow = NarrowValues(static_cast<const float *>(tensor.data), shape_.rows * shape_.blocks_per_row());
    }
}

void MatMulBlocks::check_values(const Tensor &tensor, Input input) const {
    if (input == input_tau && shape_.codebook == IRQ_INT8) refuse(shape_.codebook, "int8 blocks have no tau");
    const Shape expected = shape_of({shape_.rows, shape_.blocks_per_row()});
    if (tensor.type == type_ && tensor.shape == expected) return;
    refuse(shape_.codebook, std::string(input == input_scale ? "scale" : "tau") + " must be " +
                                (is_half() ? "float16 " : "float ") + text_of(expected) + ", got " +
                                text_of(tensor.shape));
}

// The weight where onnxruntime holds it now; for gemv, where it has one, with narrow values.
Matrix MatMulBlocks::weight(const OrtKernelContext *context, const RowGemv *gemv) const {
    Matrix w = shape_;
    w.data = ort_.input_data(context, input_codes);
    for (const Input input : {input_scale, input_tau}) {
        BlockValues &values = input == input_scale ? w.scale : w.tau;
        if (gemv != nullptr) values = (input == input_scale ? scale_ : tau_).view();
        if (values.storage != Storage::none) continue;
        if (input == input_tau && !ort_.has_input(context, input)) continue;
        if (is_checked_[input]) {
            values.values = ort_.input_data(context, input);
        } else {
            const Tensor tensor = ort_.input(context, input);
            check_values(tensor, input);
            values.values = tensor.data;
        }
        values.storage = is_half() ? Storage::f16 : Storage::f32;
    }
    return w;
}

struct MatMulBlocks::Call {
    const MatMulBlocks &op;
    const OrtKernelContext *context;
    Matrix weight;
    std::size_t tokens;
    const void *a;  // (tokens, K) of type_
    void *y;        // (tokens, N) of type_
    float *result;  // (tokens, N): y itself, or floats on their way there

    // Calls range(begin, end) on the session's threads until [0, count) is covered.
    template <class Range>
    void share_out(std::size_t count, std::size_t per_task, const Range &range) const {
        const std::size_t tasks = (count + per_task - 1) / per_task;
        const auto task = [&](std::size_t i) { range(i * per_task, std::min(count, (i + 1) * per_task)); };
        if (tasks == 1) return task(0);
        op.ort_.parallel_for(context, tasks, task);
    }

    // Rows [r0, r1) of the result into y, where they are not yet.
    void finish_rows(std::size_t r0, std::size_t r1) const {
        if (result == y) return;
        const std::size_t n = weight.rows;
        for (std::size_t t = 0; t < tokens; ++t) {
            to_halves(result + t * n + r0, r1 - r0, static_cast<std::uint16_t *>(y) + t * n + r0);
        }
    }
};

void MatMulBlocks::compute(OrtKernelContext *context) const {
    Tensor a = ort_.input(context, input_a);
    if (a.shape.empty() || a.shape.back() != static_cast<std::int64_t>(shape_.columns)) {
        refuse(shape_.codebook, "the last dimension of A must be K = " + std::to_string(shape_.columns) + ", got " +
                                    text_of(a.shape));
    }
    std::size_t tokens = 1;
    for (std::size_t i = 0; i + 1 < a.shape.size(); ++i) tokens *= static_cast<std::size_t>(a.shape[i]);
    Shape &y_shape = a.shape;
    y_shape.back() = static_cast<std::int64_t>(shape_.rows);
    void *y = ort_.output(context, 0, y_shape);
    if (tokens == 0) return;

    const std::unique_ptr<float[]> floats(is_half() ? new float[tokens * shape_.rows] : nullptr);
    float *const result = is_half() ? floats.get() : static_cast<float *>(y);
    const RowGemv *gemv = tokens == 1 ? row_gemv_for(shape_) : nullptr;
    const Call call{*this, context, weight(context, gemv), tokens, a.data, y, result};
    if (gemv != nullptr) return multiply_one(call, *gemv);
    const TiledGemm *tiled = tiled_gemm_for(shape_);
    if (tokens > few_tokens && tiled != nullptr) return multiply_many(call, *tiled);
    multiply_few(call);
}

// A decoded panel serves many tokens.
void MatMulBlocks::multiply_many(const Call &call, const TiledGemm &gemm) const {
    const std::unique_ptr<float[]> packed(new float[call.tokens * shape_.columns]);
    call.share_out(gemm.tiles(call.tokens), 1, [&](std::size_t tile, std::size_t) {
        gemm.pack(call.a, is_half(), call.tokens, shape_.columns, tile, packed.get());
    });
    call.share_out(shape_.rows, rows_per_panel_task, [&](std::size_t r0, std::size_t r1) {
        gemm.multiply(call.weight, packed.get(), call.tokens, r0, r1, call.result, shape_.rows);
        call.finish_rows(r0, r1);
    });
}

// onnxruntime's threads sleep between runs and may take 30 to 50 us to wake: they are called before anything else is
// done, and whoever is awake goes on. Each puts x into order for itself, which takes less than waiting for another.
void MatMulBlocks::multiply_one(const Call &call, const RowGemv &gemv) const {
    const std::size_t row_bytes = shape_.row_bytes(), quarter = shape_.rows * row_bytes / 4;
    const std::size_t bytes = std::clamp(quarter, least_at_a_time, most_at_a_time);
    RowQueue queue(shape_.rows, round_up(std::max<std::size_t>(1, bytes / row_bytes), row_tile));
    const std::size_t size = gemv.size(shape_);
    call.share_out(queue.most_takers(), 1, [&](std::size_t, std::size_t) {
        constexpr std::size_t most_here = 4352;  // enough for 4096 columns
        alignas(64) float here[most_here];
        const std::unique_ptr<float[]> elsewhere(size > most_here ? new float[size] : nullptr);
        gemv.multiply(call.weight, call.a, is_half(), elsewhere ? elsewhere.get() : here, &queue, call.result);
    });
    call.finish_rows(0, shape_.rows);
}

// The kernels of irq/kernels.h, in whose order the elements are put first.
void MatMulBlocks::multiply_few(const Call &call) const {
    const std::size_t k = shape_.columns, n = shape_.rows;
    Activations inputs(call.tokens, k, Mode::exact);
    std::atomic<bool> out_of_memory{!inputs.reshape(call.tokens, k)};
    const std::unique_ptr<float[]> scratch(new float[2 * k * call.tokens]);
    call.share_out(call.tokens, tokens_per_task, [&](std::size_t t0, std::size_t t1) {
        for (std::size_t t = t0; t < t1; ++t) inputs.prepare_token(t, ordered_input(call, t, scratch.get() + 2 * k * t));
    });
    const std::size_t rows_per_task = round_up(products_per_task / (k * call.tokens) + 1, row_tile);
    call.share_out(n, rows_per_task, [&](std::size_t r0, std::size_t r1) {
        if (shape_.codebook != IRQ_INT8) {
            gemm(call.weight, inputs, r0, r1, call.result, n);
        } else if (!multiply_flipped(call.weight, inputs, r0, r1, call.result)) {
            out_of_memory = true;
        }
        call.finish_rows(r0, r1);
    });
    if (out_of_memory) throw std::bad_alloc();
}

// Token t as float, elements in the kernels' order: (K,), in A itself or in scratch (2 K).
const float *MatMulBlocks::ordered_input(const Call &call, std::size_t t, float *scratch) const {
    const std::size_t k = shape_.columns;
    const float *x = static_cast<const float *>(call.a) + t * k;
    if (is_half()) {
        dequantize_rows(stock_matrix(Format::f16, call.tokens, k, call.a), t, t + 1, scratch);
        x = scratch;
    }
    if (!is_permuted(shape_)) return x;
    permute(shape_, x, scratch + k);
    return scratch + k;
}

}  // namespace irq::onnx
