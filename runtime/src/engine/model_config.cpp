#include "irq/model_config.h"

#include <cmath>

#include "irq/error.h"

namespace irq {
namespace {

[[noreturn]] void refuse(Fault fault, const std::string &message, const std::string &where,
                         const std::string &expected = {}, const std::string &got = {}) {
    throw Error(fault, message, where, expected, got);
}

void check_range(const char *name, std::int64_t value, std::int64_t limit) {
    if (value < 1 || value > limit) {
        refuse(Fault::malformed, "out of range", name, "1 to " + show(limit), show(value));
    }
}

void check(const RopeScaling &scaling) {
    if (scaling.kind != "linear" && scaling.kind != "llama3") {
        refuse(Fault::unsupported, "this RoPE scaling is not supported", "rope_scaling", "none | linear | llama3",
               scaling.kind);
    }
    if (!(scaling.factor > 0 && scaling.factor < 1e6)) {
        refuse(Fault::malformed, "absurd factor", "rope_scaling", "0 < factor < 1e6", show(scaling.factor));
    }
    const bool ordered = 0 < scaling.low_freq_factor && scaling.low_freq_factor < scaling.high_freq_factor &&
                         scaling.high_freq_factor < 1e6;
    if (scaling.kind == "llama3" && !ordered) {
        refuse(Fault::malformed, "contradictory frequency factors", "rope_scaling",
               "0 < low_freq_factor < high_freq_factor");
    }
    const std::int64_t context = scaling.original_max_position_embeddings;
    if (context <= 0 || context >= std::int64_t{1} << 31) {
        refuse(Fault::malformed, "absurd original context", "rope_scaling.original_max_position_embeddings", "",
               show(context));
    }
}

void check(const ModelConfig &c) {
    if (c.family != "llama" && c.family != "mistral" && c.family != "qwen2" && c.family != "qwen3") {
        refuse(Fault::unsupported, "this model family is not supported", "", "llama | mistral | qwen2 | qwen3",
               c.family);
    }
    check_range("hidden_size", c.hidden_size, 1 << 20);
    check_range("num_hidden_layers", c.num_hidden_layers, 512);
    check_range("num_attention_heads", c.num_attention_heads, 1 << 12);
    check_range("num_key_value_heads", c.num_key_value_heads, 1 << 12);
    check_range("head_dim", c.head_dim, 1 << 12);
    check_range("intermediate_size", c.intermediate_size, 1 << 22);
    check_range("vocab_size", c.vocab_size, 1 << 24);
    check_range("max_position_embeddings", c.max_position_embeddings, (std::int64_t{1} << 31) - 1);
    if (c.num_attention_heads % c.num_key_value_heads != 0) {
        refuse(Fault::malformed, "key-value heads do not divide the query heads", "num_key_value_heads",
               "a divisor of " + show(c.num_attention_heads), show(c.num_key_value_heads));
    }
    if (c.head_dim % 2 != 0) {
        refuse(Fault::malformed, "the rotary dimension is odd", "head_dim", "even", show(c.head_dim));
    }
    if (!(c.rms_norm_eps > 0 && c.rms_norm_eps < 1)) {
        refuse(Fault::malformed, "out of range", "rms_norm_eps", "0 to 1", show(c.rms_norm_eps));
    }
    if (!(c.rope_theta > 1 && c.rope_theta < 1e12)) {
        refuse(Fault::malformed, "out of range", "rope_theta", "1 to 1e12", show(c.rope_theta));
    }
    if (c.rope_scaling) check(*c.rope_scaling);
}

bool read_style(const Fields &fields, const std::string &key) {
    const std::string style = fields.string(key);
    if (style != "half" && style != "interleaved") {
        refuse(Fault::malformed, "unknown RoPE style", "rope_style", "half | interleaved", style);
    }
    return style == "interleaved";
}

ModelConfig read_irq(const Fields &fields) {
    const std::string prefix = "irq.model.";
    const auto integer = [&](const char *key) { return fields.integer(prefix + key); };
    ModelConfig c;
    if (fields.has(prefix + "rope_scaling.kind")) {
        const std::string scaling = prefix + "rope_scaling.";
        c.rope_scaling = RopeScaling{fields.string(scaling + "kind"), fields.number(scaling + "factor"),
                                     fields.number(scaling + "low_freq_factor"),
                                     fields.number(scaling + "high_freq_factor"),
                                     fields.integer(scaling + "original_max_position_embeddings")};
    }
    c.family = fields.string(prefix + "family");
    c.hidden_size = integer("hidden_size");
    c.num_hidden_layers = integer("num_hidden_layers");
    c.num_attention_heads = integer("num_attention_heads");
    c.num_key_value_heads = integer("num_key_value_heads");
    c.head_dim = integer("head_dim");
    c.intermediate_size = integer("intermediate_size");
    c.vocab_size = integer("vocab_size");
    c.max_position_embeddings = integer("max_position_embeddings");
    c.rms_norm_eps = fields.number(prefix + "rms_norm_eps");
    c.rope_theta = fields.number(prefix + "rope_theta");
    c.interleaved = read_style(fields, prefix + "rope_style");
    c.tie_word_embeddings = fields.boolean(prefix + "tie_word_embeddings");
    c.qkv_bias = fields.boolean(prefix + "qkv_bias");
    c.qk_norm = fields.boolean(prefix + "qk_norm");
    return c;
}

// As llama.cpp reads them: the old name of the factor where the new one is absent, and 0 means 1.
std::optional<RopeScaling> read_stock_scaling(const Fields &fields, const std::string &arch) {
    const double attn_factor = fields.number(arch + ".rope.scaling.attn_factor", 1.0);
    if (attn_factor != 1.0) {
        refuse(Fault::unsupported, "rotary embeddings that also scale are not supported",
               arch + ".rope.scaling.attn_factor", "1", show(attn_factor));
    }
    const std::string kind = fields.string(arch + ".rope.scaling.type", "linear");
    const double factor = fields.number(arch + ".rope.scaling.factor", fields.number(arch + ".rope.scale_linear", 0.0));
    if (kind == "none" || (kind == "linear" && (factor == 0.0 || factor == 1.0))) return {};
    if (kind != "linear") {
        refuse(Fault::unsupported, "this RoPE scaling is not supported", arch + ".rope.scaling.type",
               "none | linear, or llama3 through rope_freqs.weight", kind);
    }
    return RopeScaling{"linear", factor};
}

ModelConfig read_stock(const GgufFile &gguf, const Fields &fields, const std::string &arch) {
    if (arch != "llama" && arch != "qwen2" && arch != "qwen3") {
        refuse(Fault::unsupported, "this architecture is not supported", "general.architecture",
               "irq | llama | qwen2 | qwen3", arch);
    }
    const auto integer = [&](const char *key, std::optional<std::int64_t> fallback = {}) {
        return fields.integer(arch + "." + key, fallback);
    };
    if (integer("expert_count", 0) != 0) {
        refuse(Fault::unsupported, "mixtures of experts are not supported", arch + ".expert_count");
    }
    ModelConfig c;
    c.family = arch;
    c.hidden_size = integer("embedding_length");
    c.num_attention_heads = integer("attention.head_count");
    if (c.num_attention_heads < 1 || c.num_attention_heads > c.hidden_size) {
        refuse(Fault::malformed, "out of range", arch + ".attention.head_count", "1 to " + show(c.hidden_size),
               show(c.num_attention_heads));
    }
    c.head_dim = integer("attention.key_length", c.hidden_size / c.num_attention_heads);
    for (const char *key : {"attention.value_length", "rope.dimension_count"}) {
        const std::int64_t got = integer(key, c.head_dim);
        if (got != c.head_dim) {
            refuse(Fault::malformed, "contradicts the width of a head", arch + "." + key, show(c.head_dim), show(got));
        }
    }
    c.num_hidden_layers = integer("block_count");
    c.num_key_value_heads = integer("attention.head_count_kv", c.num_attention_heads);
    c.intermediate_size = integer("feed_forward_length");
    c.vocab_size = fields.has(arch + ".vocab_size")
                       ? integer("vocab_size")
                       : static_cast<std::int64_t>(fields.strings("tokenizer.ggml.tokens").count);
    c.max_position_embeddings = integer("context_length");
    c.rms_norm_eps = fields.number(arch + ".attention.layer_norm_rms_epsilon");
    c.rope_theta = fields.number(arch + ".rope.freq_base", 10000.0);
    c.rope_scaling = read_stock_scaling(fields, arch);
    c.interleaved = arch == "llama";
    c.tie_word_embeddings = gguf.find("output.weight") == nullptr;
    c.qkv_bias = gguf.find("blk.0.attn_q.bias") != nullptr;
    c.qk_norm = gguf.find("blk.0.attn_q_norm.weight") != nullptr;
    return c;
}

// Llama 3.1: long waves are slowed down by `factor`, short ones kept, a ramp between.
float llama3(float base, const RopeScaling &s) {
    const auto context = static_cast<double>(s.original_max_position_embeddings);
    const auto low = static_cast<float>(context / s.low_freq_factor);
    const auto high = static_cast<float>(context / s.high_freq_factor);
    const auto factor = static_cast<float>(s.factor);
    const float wavelength = static_cast<float>(2 * M_PI) / base;  // positions per turn
    const float slowed = wavelength > low ? base / factor : base;
    if (wavelength < high || wavelength > low) return slowed;
    const float ramp = (static_cast<float>(context) / wavelength - static_cast<float>(s.low_freq_factor)) /
                       static_cast<float>(s.high_freq_factor - s.low_freq_factor);
    return (1.0F - ramp) * slowed / factor + ramp * slowed;
}

}  // namespace

ModelConfig read_model(const GgufFile &gguf) {
    const Fields fields(gguf.values(), "metadata");
    const std::string arch = fields.string("general.architecture");
    const ModelConfig config = arch == "irq" ? read_irq(fields) : read_stock(gguf, fields, arch);
    check(config);
    if (fields.has("tokenizer.ggml.tokens")) {
        const auto tokens = static_cast<std::int64_t>(fields.strings("tokenizer.ggml.tokens").count);
        if (tokens != config.vocab_size) {
            refuse(Fault::malformed, "vocabulary and token list differ", "tokenizer.ggml.tokens",
                   show(config.vocab_size), show(tokens));
        }
    }
    return config;
}

std::vector<float> inverse_frequencies(const ModelConfig &config) {
    const auto head_dim = static_cast<float>(config.head_dim);
    const auto theta = static_cast<double>(static_cast<float>(config.rope_theta));
    std::vector<float> frequencies;
    for (std::int64_t i = 0; i < config.head_dim; i += 2) {
        const float exponent = static_cast<float>(i) / head_dim;
        const float base = 1.0F / static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
        float frequency = base;
        if (config.rope_scaling && config.rope_scaling->kind == "linear") {
            frequency = base / static_cast<float>(config.rope_scaling->factor);
        } else if (config.rope_scaling) {
            frequency = llama3(base, *config.rope_scaling);
        }
        frequencies.push_back(frequency);
    }
    return frequencies;
}

std::map<std::string, std::vector<std::uint64_t>> tensor_shapes(const ModelConfig &config) {
    const auto u = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
    const std::uint64_t hidden = u(config.hidden_size), inner = u(config.intermediate_size);
    const std::uint64_t head = u(config.head_dim), vocab = u(config.vocab_size);
    const std::uint64_t q_width = u(config.num_attention_heads) * head;
    const std::uint64_t kv_width = u(config.num_key_value_heads) * head;
    std::map<std::string, std::vector<std::uint64_t>> shapes{
        {"token_embd.weight", {vocab, hidden}}, {"output_norm.weight", {hidden}}};
    if (!config.tie_word_embeddings) shapes["output.weight"] = {vocab, hidden};
    for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
        const std::string name = "blk." + show(layer) + ".";
        shapes[name + "attn_norm.weight"] = shapes[name + "ffn_norm.weight"] = {hidden};
        shapes[name + "attn_q.weight"] = {q_width, hidden};
        shapes[name + "attn_k.weight"] = shapes[name + "attn_v.weight"] = {kv_width, hidden};
        shapes[name + "attn_output.weight"] = {hidden, q_width};
        shapes[name + "ffn_gate.weight"] = shapes[name + "ffn_up.weight"] = {inner, hidden};
        shapes[name + "ffn_down.weight"] = {hidden, inner};
        if (config.qkv_bias) {
            shapes[name + "attn_q.bias"] = {q_width};
            shapes[name + "attn_k.bias"] = shapes[name + "attn_v.bias"] = {kv_width};
        }
        if (config.qk_norm) shapes[name + "attn_q_norm.weight"] = shapes[name + "attn_k_norm.weight"] = {head};
    }
    return shapes;
}

}  // namespace irq
