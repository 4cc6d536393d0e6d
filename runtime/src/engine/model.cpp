#include "irq/model.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "irq/error.h"
#include "payload.h"

namespace irq {
namespace {

bool is_linear(const std::string &name) {
    static const char *const parts[] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
    if (name.rfind("blk.", 0) != 0) return false;
    const std::string part = name.substr(name.rfind('.') + 1);
    return std::find(std::begin(parts), std::end(parts), part) != std::end(parts);
}

void check_adapter_fits(const Adapter &adapter, const ModelConfig &config, const std::string &where) {
    const auto shapes = tensor_shapes(config);
    for (const auto &[name, lora] : adapter) {
        const auto shape = shapes.find(name + ".weight");
        const bool known = is_linear(name) && shape != shapes.end();
        const std::vector<std::uint64_t> got{lora.out, lora.in};
        if (!known || shape->second != got) {
            throw Error(Fault::malformed, "the adapter does not fit the model", where + ": " + name,
                        known ? show_shape(shape->second) : "no such linear layer", show_shape(got));
        }
    }
}

}  // namespace

Matrix stock_view(const GgufFile &gguf, const TensorInfo &tensor) {
    Format format{};
    switch (tensor.type) {
        case GgmlType::f32: format = Format::f32; break;
        case GgmlType::f16: format = Format::f16; break;
        case GgmlType::bf16: format = Format::bf16; break;
        case GgmlType::q8_0: format = Format::q8_0; break;
        case GgmlType::q4_0: format = Format::q4_0; break;
        case GgmlType::q4_1: format = Format::q4_1; break;
        default:
            throw Error(Fault::unsupported, "the engine does not compute with this type",
                        gguf.path() + ": " + tensor.name, "F32 | F16 | BF16 | Q8_0 | Q4_0 | Q4_1; Q2_0 for matrices",
                        block_layout(tensor.type).name);
    }
    const std::size_t columns = tensor.shape.back();
    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < tensor.shape.size(); ++i) rows *= tensor.shape[i];
    return stock_matrix(format, rows, columns, gguf.data(tensor));
}

std::vector<float> read_f32(const GgufFile &gguf, const TensorInfo &tensor) {
    const Matrix view = stock_view(gguf, tensor);
    std::vector<float> values(view.rows * view.columns);
    dequantize_rows(view, 0, view.rows, values.data());
    return values;
}

Model::Model(const std::string &path, const std::string &adapter, double adapter_scale, Mode mode)
    : file_(std::make_unique<GgufFile>(path)) {
    const Fields fields(file_->values(), path);
    if (fields.string("general.type", "model") == "adapter") {
        throw Error(Fault::usage, "this file is an adapter, not a model", path, "", "", "Give it as the adapter");
    }
    if (!std::isfinite(adapter_scale)) throw Error(Fault::usage, "the adapter's scale is not finite");
    Adapter folded;
    if (fields.string("general.architecture") == "irq") {
        read_irq(adapter, adapter_scale, folded);
    } else {
        read_stock(adapter, adapter_scale, folded);
    }
    if (folded.empty() && adapter_scale != 1) {
        throw Error(Fault::usage, "there is no adapter to scale", path, "", "scale " + show(adapter_scale));
    }
    check_adapter_fits(folded, config_, adapter.empty() ? path : adapter);

    embedding_ = matrix("token_embd.weight");
    output_norm_ = vector("output_norm.weight");
    head_ = linear(config_.tie_word_embeddings ? "token_embd" : "output", folded, mode);
    for (std::int64_t i = 0; i < config_.num_hidden_layers; ++i) {
        const std::string name = "blk." + show(i) + ".";
        Layer layer;
        layer.attn_norm = vector(name + "attn_norm.weight");
        layer.ffn_norm = vector(name + "ffn_norm.weight");
        if (config_.qk_norm) {
            layer.q_norm = vector(name + "attn_q_norm.weight");
            layer.k_norm = vector(name + "attn_k_norm.weight");
        }
        layer.q = linear(name + "attn_q", folded, mode);
        layer.k = linear(name + "attn_k", folded, mode);
        layer.v = linear(name + "attn_v", folded, mode);
        layer.output = linear(name + "attn_output", folded, mode);
        layer.gate = linear(name + "ffn_gate", folded, mode);
        layer.up = linear(name + "ffn_up", folded, mode);
        layer.down = linear(name + "ffn_down", folded, mode);
        layers_.push_back(std::move(layer));
    }
    check_unchanged();
}

void Model::read_irq(const std::string &adapter, double scale, Adapter &folded) {
    check_irq_header(*file_, "model");
    config_ = read_model(*file_);
    std::set<std::string> known;
    blocks_ = read_blocks(*file_, known);
    const auto shapes = tensor_shapes(config_);
    for (const auto &[name, view] : blocks_) {
        const auto shape = shapes.find(name);
        const std::vector<std::uint64_t> got{view.rows, view.columns};
        if (shape == shapes.end() || shape->second != got) {
            throw Error(Fault::malformed, "this matrix is not the model's", path_of(name),
                        shape == shapes.end() ? "no such tensor" : show_shape(shape->second), show_shape(got));
        }
    }
    for (const auto &[name, shape] : shapes) {
        if (blocks_.count(name) != 0) continue;
        const TensorInfo *tensor = file_->find(name);
        if (tensor == nullptr) {
            throw Error(Fault::malformed, "tensor missing", path_of(name), show_shape(shape));
        }
        const bool is_float = tensor->type == GgmlType::f32 || tensor->type == GgmlType::f16 ||
                              tensor->type == GgmlType::bf16;
        if (tensor->shape != shape || !is_float) {
            throw Error(Fault::malformed, "tensor is not as the model asks", path_of(name),
                        "F32 | F16 | BF16 " + show_shape(shape),
                        block_layout(tensor->type).name + (" " + show_shape(tensor->shape)));
        }
        known.insert(name);
    }
    folded = read_irq_adapter(*file_, scale, known);
    check_no_strangers(*file_, known);
    check_base(*file_, *file_);
    frequencies_ = inverse_frequencies(config_);
    if (adapter.empty()) return;
    if (!folded.empty()) {
        throw Error(Fault::usage, "the model embeds an adapter already", file_->path(), "", "",
                    "Leave the adapter out, or export the model with the adapter separate");
    }
    const GgufFile other(adapter);
    check_irq_header(other, "adapter");
    check_base(*file_, other);
    std::set<std::string> adapter_names;
    folded = read_irq_adapter(other, scale, adapter_names);
    check_no_strangers(other, adapter_names);
}

void Model::read_stock(const std::string &adapter, double scale, Adapter &folded) {
    config_ = read_model(*file_);
    const std::string factors_name = "rope_freqs.weight";
    std::set<std::string> known{factors_name};
    for (const auto &[name, shape] : tensor_shapes(config_)) {
        const TensorInfo *tensor = file_->find(name);
        if (tensor == nullptr || tensor->shape != shape) {
            throw Error(Fault::malformed, "tensor is missing or of another shape", path_of(name), show_shape(shape),
                        tensor == nullptr ? "nothing" : show_shape(tensor->shape));
        }
        known.insert(name);
    }
    check_no_strangers(*file_, known);
    frequencies_ = inverse_frequencies(config_);
    if (const TensorInfo *tensor = file_->find(factors_name)) {
        const std::vector<float> factors = read_f32(*file_, *tensor);
        const bool fits = tensor->shape.size() == 1 && factors.size() == frequencies_.size() &&
                          std::all_of(factors.begin(), factors.end(), [](float factor) { return factor > 0; });
        if (!fits) {
            throw Error(Fault::malformed, "rotary factors", file_->path(), show(frequencies_.size()) + ", positive");
        }
        for (std::size_t i = 0; i < factors.size(); ++i) frequencies_[i] /= factors[i];
    }
    if (adapter.empty()) {
        check_pair(*file_, nullptr);
        return;
    }
    const GgufFile other(adapter);
    check_pair(*file_, &other);
    const Fields fields(file_->values(), file_->path());
    folded = read_stock_adapter(other, fields.string("general.architecture"), scale);
}

std::string Model::path_of(const std::string &name) const { return file_->path() + ": " + name; }

Matrix Model::matrix(const std::string &name) {
    const auto block = blocks_.find(name);
    if (block != blocks_.end()) return block->second;
    const TensorInfo &tensor = *file_->find(name);
    if (tensor.type != GgmlType::q2_0) return stock_view(*file_, tensor);
    return blocks_.emplace(name, repacked(tensor)).first->second;  // a tied head asks again
}

// The only carrier that is copied (see repack_q2_0).
Matrix Model::repacked(const TensorInfo &tensor) {
    Matrix matrix;
    matrix.format = Format::blocks;
    matrix.codebook = IRQ_INT2;
    matrix.block_size = 64;
    matrix.rows = tensor.shape.front();
    matrix.columns = tensor.shape.back();
    auto &codes = codes_.emplace_back(matrix.rows * matrix.row_bytes());
    auto &scales = halves_.emplace_back(matrix.rows * matrix.blocks_per_row());
    repack_q2_0(file_->data(tensor), scales.size(), codes.data(), scales.data());
    matrix.data = codes.data();
    matrix.scale.storage = Storage::f16;
    matrix.scale.values = scales.data();
    return matrix;
}

std::vector<float> Model::vector(const std::string &name) const { return read_f32(*file_, *file_->find(name)); }

Linear Model::linear(const std::string &name, const Adapter &adapter, Mode mode) {
    Linear linear;
    linear.weight = matrix(name + ".weight");
    if (config_.qkv_bias && file_->find(name + ".bias") != nullptr) linear.bias = vector(name + ".bias");
    const auto found = adapter.find(name);
    if (found != adapter.end()) {
        const Lora &lora = found->second;
        linear.lora_a = keep(lora.a, lora.rank, lora.in, mode);
        linear.lora_b = keep(lora.b, lora.out, lora.rank, mode);
    }
    return linear;
}

// Holds a folded adapter matrix for the life of the model: fp16 in fast mode if its range allows.
Matrix Model::keep(const std::vector<float> &values, std::size_t rows, std::size_t columns, Mode mode) {
    const bool fits = std::all_of(values.begin(), values.end(), [](float v) { return std::abs(v) < 65504.0F; });
    if (mode == Mode::fast && fits) {
        auto &half = halves_.emplace_back(values.size());
        std::transform(values.begin(), values.end(), half.begin(), to_half);
        return stock_matrix(Format::f16, rows, columns, half.data());
    }
    return stock_matrix(Format::f32, rows, columns, floats_.emplace_back(values).data());
}

std::uint64_t Model::file_bytes() const { return file_->size(); }

std::uint64_t Model::bytes_per_token() const {
    std::uint64_t total = head_.weight.total_bytes();
    for (const Layer &layer : layers_) {
        for (const Linear *linear : {&layer.q, &layer.k, &layer.v, &layer.output, &layer.gate, &layer.up, &layer.down}) {
            total += linear->weight.total_bytes();
            if (linear->has_lora()) total += linear->lora_a.total_bytes() + linear->lora_b.total_bytes();
        }
    }
    return total;
}

std::size_t Model::max_rank() const {
    std::size_t rank = 0;
    for (const Layer &layer : layers_) {
        for (const Linear *linear : {&layer.q, &layer.k, &layer.v, &layer.output, &layer.gate, &layer.up, &layer.down}) {
            rank = std::max(rank, linear->lora_a.rows);
        }
    }
    return rank;
}

}  // namespace irq
