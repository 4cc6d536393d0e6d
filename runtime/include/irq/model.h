// A model ready to run: views of the mapped file, small tensors copied, adapters folded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "irq/gguf.h"
#include "irq/kernels.h"
#include "irq/model_config.h"

namespace irq {

// A LoRA branch with elastic connections and scaling folded in: y += B (A x).
struct Lora {
    std::size_t rank = 0, in = 0, out = 0;
    std::vector<float> a;  // (rank, in)
    std::vector<float> b;  // (out, rank)
};
using Adapter = std::map<std::string, Lora>;  // by stock name without ".weight"

struct Linear {
    Matrix weight;
    Matrix lora_a, lora_b;    // rows 0: no branch
    std::vector<float> bias;  // (rows,) or empty

    bool has_lora() const { return lora_a.rows != 0; }
};

struct Layer {
    std::vector<float> attn_norm, ffn_norm;  // (hidden_size,)
    std::vector<float> q_norm, k_norm;       // (head_dim,) or empty
    Linear q, k, v, output, gate, up, down;
};

class Model {
public:
    // Opens a model file (irq, or stock F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q2_0) and, unless `adapter` is empty, an
    // adapter file of the same profile. Mode::fast keeps adapters in fp16, exact in float32.
    // Error: see irq_runtime.weights.open_weights.
    Model(const std::string &path, const std::string &adapter, double adapter_scale, Mode mode);
    Model(const Model &) = delete;
    Model &operator=(const Model &) = delete;

    const ModelConfig &config() const { return config_; }
    const std::vector<float> &frequencies() const { return frequencies_; }  // (head_dim / 2,), radians
    const std::vector<Layer> &layers() const { return layers_; }
    const std::vector<float> &output_norm() const { return output_norm_; }
    const Matrix &embedding() const { return embedding_; }
    const Linear &head() const { return head_; }

    std::uint64_t file_bytes() const;
    std::uint64_t bytes_per_token() const;  // of weights and adapters read to decode one token
    std::size_t max_rank() const;
    void check_unchanged() const { file_->check_unchanged(); }

private:
    void read_irq(const std::string &adapter, double scale, Adapter &layers);
    void read_stock(const std::string &adapter, double scale, Adapter &layers);
    std::string path_of(const std::string &name) const;
    Matrix matrix(const std::string &name);
    Matrix repacked(const TensorInfo &tensor);
    std::vector<float> vector(const std::string &name) const;
    Linear linear(const std::string &name, const Adapter &adapter, Mode mode);
    Matrix keep(const std::vector<float> &values, std::size_t rows, std::size_t columns, Mode mode);

    std::unique_ptr<GgufFile> file_;
    ModelConfig config_;
    std::vector<float> frequencies_;
    std::map<std::string, Matrix> blocks_;  // block-quantised, by stock name with ".weight"; Q2_0 too
    std::deque<std::vector<float>> floats_;          // folded adapters
    std::deque<std::vector<std::uint16_t>> halves_;  // the same in fp16; scales of Q2_0
    std::deque<std::vector<std::uint8_t>> codes_;    // of Q2_0
    std::vector<Layer> layers_;
    std::vector<float> output_norm_;
    Matrix embedding_;
    Linear head_;
};

}  // namespace irq
