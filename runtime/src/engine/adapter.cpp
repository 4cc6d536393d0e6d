// Adapters of both profiles. Elastic connections and scaling are folded in float64, rounded once.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>

#include "irq/error.h"
#include "payload.h"

namespace irq {
namespace {

[[noreturn]] void malformed(const std::string &message, const std::string &where, const std::string &expected = {},
                            const std::string &got = {}) {
    throw Error(Fault::malformed, message, where, expected, got);
}

const TensorInfo &matrix_info(const GgufFile &gguf, const std::string &name) {
    const TensorInfo *tensor = gguf.find(name);
    if (tensor == nullptr) malformed("tensor missing", gguf.path() + ": " + name);
    if (tensor->shape.size() != 2) {
        malformed("not a matrix", gguf.path() + ": " + name, "", show_shape(tensor->shape));
    }
    return *tensor;
}

void require_f32(const GgufFile &gguf, const TensorInfo &tensor) {
    if (tensor.type != GgmlType::f32) {
        malformed("tensor is not as declared", gguf.path() + ": " + tensor.name, "F32",
                  block_layout(tensor.type).name);
    }
}

void check_finite(const std::vector<float> &values, const char *name, const std::string &where) {
    for (const float value : values) {
        if (!std::isfinite(value)) malformed(std::string(name) + " holds NaN or infinity", where);
    }
}

// `factor` times (weight + beta * elastic), the elastic connection written as a matrix: element [j, i] is
// groups / columns where row j and column i are in the same of the gcd(rows, columns) groups.
void fold(std::vector<float> &weight, std::size_t rows, std::size_t columns, double beta, double factor) {
    const std::size_t groups = std::gcd(rows, columns);
    const std::size_t height = rows / groups, width = columns / groups;
    const double step = beta * static_cast<double>(groups) / static_cast<double>(columns);
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t column = 0; column < columns; ++column) {
            float &value = weight[row * columns + column];
            const double elastic = row / height == column / width ? step : 0.0;
            value = static_cast<float>(factor * (static_cast<double>(value) + elastic));
        }
    }
}

Lora make_lora(const GgufFile &gguf, const TensorInfo &a, const TensorInfo &b, double beta1, double beta2,
               double scaling, const std::string &where) {
    Lora lora;
    lora.rank = a.shape[0];
    lora.in = a.shape[1];
    lora.out = b.shape[0];
    if (b.shape[1] != lora.rank) {
        malformed("lora_A and lora_B do not form a pair", where, "(r, in) and (out, r)",
                  show_shape(a.shape) + " and " + show_shape(b.shape));
    }
    for (const double value : {beta1, beta2, scaling}) {
        if (!std::isfinite(value)) malformed("beta1, beta2 or scaling is not a finite number", where);
    }
    lora.a = read_f32(gguf, a);
    lora.b = read_f32(gguf, b);
    check_finite(lora.a, "lora_A", where);
    check_finite(lora.b, "lora_B", where);
    fold(lora.a, lora.rank, lora.in, beta1, 1.0);
    fold(lora.b, lora.out, lora.rank, beta2, scaling);
    return lora;
}

std::string base_hash(const GgufFile &gguf, const char *key) {
    const Fields fields(gguf.values(), gguf.path());
    if (!fields.has(key)) return {};
    const std::string hash = fields.string(key);
    if (hash.size() != 64 || hash.find_first_not_of("0123456789abcdef") != std::string::npos) {
        malformed("not a hash", gguf.path() + ": " + key, "64 lower-case hex digits", hash.substr(0, 80));
    }
    return hash;
}

// Names beside which an array of bools, or of numbers, holds true, or more than 0; without the key none.
std::set<std::string> marked(const GgufFile &gguf, const char *key, bool is_bool) {
    const Fields fields(gguf.values(), gguf.path());
    if (!fields.has(key)) return {};
    const auto &names = fields.strings("irq.stock.name").strings;
    std::vector<std::uint64_t> marks;
    if (is_bool) {
        const std::vector<bool> flags = fields.bool_array(key);
        marks.assign(flags.begin(), flags.end());
    } else {
        marks = fields.unsigned_array(key);
    }
    if (marks.size() != names.size()) {
        malformed("parallel arrays differ in length", gguf.path() + ": " + key, show(names.size()), show(marks.size()));
    }
    std::set<std::string> found;
    for (std::size_t i = 0; i < names.size(); ++i) {
        if (marks[i] != 0) found.insert(names[i]);
    }
    return found;
}

}  // namespace

void check_irq_header(const GgufFile &gguf, const std::string &kind) {
    const Fields fields(gguf.values(), gguf.path());
    for (const auto &[key, expected] : {std::pair{"general.architecture", std::string("irq")}, {"general.type", kind}}) {
        const std::string got = fields.string(key);
        if (got != expected) {
            malformed("not an irq " + kind + " file", gguf.path() + ": " + key, expected, got);
        }
    }
    const std::int64_t version = fields.integer("irq.version");
    if (version != 1) {
        throw Error(Fault::unsupported, "this irq version is not known here", gguf.path(), "1", show(version),
                    "Update irq-export");
    }
    if (kind == "model" && base_hash(gguf, "irq.base_hash").empty()) {  // else any adapter would do
        malformed("required key missing", gguf.path() + ": irq.base_hash");
    }
}

void check_base(const GgufFile &model, const GgufFile &adapter) {
    const std::string expected = base_hash(model, "irq.base_hash");
    const std::string got = base_hash(adapter, "irq.adapter.base_hash");
    if (!expected.empty() && !got.empty() && expected != got) {
        throw Error(Fault::wrong_base, "the adapter was trained against another quantised base", adapter.path(),
                    expected, got, "Export the adapter together with the checkpoint it belongs to");
    }
}

void check_pair(const GgufFile &base, const GgufFile *adapter) {
    const std::set<std::string> missing = marked(base, "irq.stock.tau", true);
    if (adapter == nullptr) {
        if (missing.empty()) return;
        throw Error(Fault::usage, "this file is one half of a pair: the offsets of its blocks lie in the adapter",
                    base.path(), "", "", "Give the adapter.gguf of the pair as the adapter");
    }
    check_base(base, *adapter);
    const std::set<std::string> carried = marked(*adapter, "irq.stock.tau_rank", false);
    std::vector<std::string> differing;
    std::set_symmetric_difference(missing.begin(), missing.end(), carried.begin(), carried.end(),
                                  std::back_inserter(differing));
    if (differing.empty()) return;
    const std::string &name = differing.front();
    throw Error(Fault::wrong_base, "the base and the adapter are not of one pair", adapter->path() + ": " + name,
                missing.count(name) != 0 ? "offsets of this matrix" : "no offsets: the base lacks none", "",
                "Use both files of one export");
}

void check_no_strangers(const GgufFile &gguf, const std::set<std::string> &known) {
    for (const auto &[name, tensor] : gguf.tensors()) {
        if (known.count(name) == 0) malformed("tensors that belong to nothing", gguf.path(), "", name);
    }
}

Adapter read_irq_adapter(const GgufFile &gguf, double scale, std::set<std::string> &known) {
    const Fields fields(gguf.values(), gguf.path());
    if (!fields.has("irq.adapter.name")) return {};
    const auto &names = fields.strings("irq.adapter.name").strings;
    const auto scaling = fields.float_array("irq.adapter.scaling");
    const auto iec = fields.bool_array("irq.adapter.iec");
    if (scaling.size() != names.size() || iec.size() != names.size()) {
        malformed("parallel arrays differ in length", gguf.path() + ": irq.adapter", show(names.size()));
    }
    Adapter adapter;
    for (std::size_t i = 0; i < names.size(); ++i) {
        const std::string &name = names[i], where = gguf.path() + ": " + name;
        const TensorInfo &a = matrix_info(gguf, name + ".lora_a"), &b = matrix_info(gguf, name + ".lora_b");
        require_f32(gguf, a);
        require_f32(gguf, b);
        known.insert({a.name, b.name});
        float beta[2] = {0, 0};
        if (iec[i]) {
            const TensorInfo *tensor = gguf.find(name + ".lora_beta");
            if (tensor == nullptr) malformed("tensor missing", where + ".lora_beta");
            require_f32(gguf, *tensor);
            if (tensor->shape != std::vector<std::uint64_t>{2}) {
                malformed("tensor is not as declared", where + ".lora_beta", "(2,)", show_shape(tensor->shape));
            }
            const std::vector<float> values = read_f32(gguf, *tensor);
            std::copy(values.begin(), values.end(), beta);
            known.insert(tensor->name);
        }
        const double factor = scaling[i] * scale;
        if (!adapter.emplace(name, make_lora(gguf, a, b, beta[0], beta[1], factor, where)).second) {
            malformed("listed twice", gguf.path() + ": irq.adapter.name", "", name);
        }
    }
    return adapter;
}

Adapter read_stock_adapter(const GgufFile &gguf, const std::string &architecture, double scale) {
    const Fields fields(gguf.values(), gguf.path());
    for (const auto &[key, expected] : {std::pair{"general.type", std::string("adapter")},
                                        {"adapter.type", "lora"},
                                        {"general.architecture", architecture}}) {
        const std::string got = fields.string(key);
        if (got != expected) {
            throw Error(Fault::unsupported, "not a LoRA adapter for this model", gguf.path() + ": " + key, expected,
                        got);
        }
    }
    const double alpha = fields.number("adapter.lora.alpha", 0.0);
    Adapter adapter;
    for (const auto &[tensor_name, tensor] : gguf.tensors()) {
        const std::string name = tensor_name.substr(0, tensor_name.rfind(".lora_"));
        const TensorInfo *a = gguf.find(name + ".lora_a"), *b = gguf.find(name + ".lora_b");
        const std::string suffix = ".weight";
        const bool is_weight =
            name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
        if (!is_weight || a == nullptr || b == nullptr || (&tensor != a && &tensor != b)) {
            malformed("not a pair of LoRA matrices", gguf.path(), name + ".lora_a and " + name + ".lora_b");
        }
        if (&tensor == b) continue;
        matrix_info(gguf, a->name);
        matrix_info(gguf, b->name);
        // llama.cpp: alpha 0 or absent means a scaling of 1
        const double scaling = alpha == 0 ? 1.0 : alpha / static_cast<double>(a->shape[0]);
        adapter.emplace(name.substr(0, name.size() - suffix.size()),
                        make_lora(gguf, *a, *b, 0, 0, scaling * scale, gguf.path() + ": " + name));
    }
    return adapter;
}

}  // namespace irq
