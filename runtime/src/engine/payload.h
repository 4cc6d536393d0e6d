// The irq payload and stock adapters, reading side: C++ twin of irq_formats.gguf.irq_payload.
#pragma once

#include <map>
#include <set>
#include <string>

#include "irq/gguf.h"
#include "irq/model.h"

namespace irq {

// Checks architecture, general.type ("model" or "adapter"), irq.version and that a model has its hash.
void check_irq_header(const GgufFile &gguf, const std::string &kind);

// Error (wrong_base) if both name a hash and they differ.
void check_base(const GgufFile &model, const GgufFile &adapter);

// Error if a stock model and what is to run with it (null: nothing) are not of one pair, as far as they say:
// C++ twin of irq_formats.gguf.pair.
void check_pair(const GgufFile &base, const GgufFile *adapter);

// Views of all block-quantised matrices by stock name with ".weight"; every part and value checked.
// Adds the names of all parts to `known`.
std::map<std::string, Matrix> read_blocks(const GgufFile &gguf, std::set<std::string> &known);

// Adapter of an irq model or adapter file, folded; empty if there is none.
Adapter read_irq_adapter(const GgufFile &gguf, double scale, std::set<std::string> &known);

// LoRA file of llama.cpp for a model of `architecture`.
Adapter read_stock_adapter(const GgufFile &gguf, const std::string &architecture, double scale);

// Error if the file holds a tensor that is not in `known`.
void check_no_strangers(const GgufFile &gguf, const std::set<std::string> &known);

// A tensor in one of the carriers the kernels decode. Error: another type.
Matrix stock_view(const GgufFile &gguf, const TensorInfo &tensor);

// Blocks of ggml's Q2_0 as irq's int2 with fp16 scales, 18 bytes of 64 weights again: codes (count, 16),
// scales (count,). The kernels want another order of elements than ggml's.
void repack_q2_0(const std::uint8_t *blocks, std::size_t count, std::uint8_t *codes, std::uint16_t *scales);

// A tensor of such a type as float32.
std::vector<float> read_f32(const GgufFile &gguf, const TensorInfo &tensor);

}  // namespace irq
