// The model description: C++ twin of irq_formats.model, .gguf.model_keys and .rope.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "irq/gguf.h"

namespace irq {

// Typed access to metadata somebody else wrote; every miss is an Error that names the key.
class Fields {
public:
    Fields(const std::unordered_map<std::string, Value> &values, std::string where)
        : values_(values), where_(std::move(where)) {}

    bool has(const std::string &key) const { return values_.count(key) != 0; }
    std::int64_t integer(const std::string &key, std::optional<std::int64_t> fallback = {}) const;
    double number(const std::string &key, std::optional<double> fallback = {}) const;  // finite
    bool boolean(const std::string &key) const;
    std::string string(const std::string &key, std::optional<std::string> fallback = {}) const;
    const Value &strings(const std::string &key) const;
    std::vector<std::uint64_t> unsigned_array(const std::string &key) const;
    std::vector<double> float_array(const std::string &key) const;
    std::vector<bool> bool_array(const std::string &key) const;

private:
    const Value &get(const std::string &key) const;
    [[noreturn]] void wrong(const std::string &key, const std::string &expected) const;

    const std::unordered_map<std::string, Value> &values_;
    std::string where_;
};

struct RopeScaling {
    std::string kind;  // linear | llama3
    double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
    std::int64_t original_max_position_embeddings = 8192;
};

// Fields as in irq_formats.model.ModelConfig.
struct ModelConfig {
    std::string family;
    std::int64_t hidden_size = 0, num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0;
    std::int64_t head_dim = 0, intermediate_size = 0, vocab_size = 0, max_position_embeddings = 0;
    double rms_norm_eps = 0, rope_theta = 0;
    std::optional<RopeScaling> rope_scaling;
    bool interleaved = false;  // rope_style
    bool tie_word_embeddings = false, qkv_bias = false, qk_norm = false;
};

// Reads and checks the description in a model file of the irq or a stock profile.
ModelConfig read_model(const GgufFile &gguf);

// Angle per position of every rotated pair, (head_dim / 2,), radians, in transformers' float32 arithmetic.
std::vector<float> inverse_frequencies(const ModelConfig &config);

// Every tensor a model consists of, by stock name, numpy order.
std::map<std::string, std::vector<std::uint64_t>> tensor_shapes(const ModelConfig &config);

}  // namespace irq
