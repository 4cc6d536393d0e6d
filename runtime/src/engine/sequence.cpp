#include <cstdlib>
#include <limits>

#include "irq/engine.h"
#include "irq/error.h"
#include "vector_ops.h"

namespace irq {

void Sequence::Free::operator()(void *memory) const { std::free(memory); }

Sequence::Sequence(std::uint64_t owner, const ModelConfig &config, std::size_t capacity, bool is_half)
    : owner_(owner),
      layers_(static_cast<std::size_t>(config.num_hidden_layers)),
      heads_(static_cast<std::size_t>(config.num_key_value_heads)),
      capacity_(padded(capacity)),
      head_dim_(static_cast<std::size_t>(config.head_dim)),
      is_half_(is_half),
      head_bytes_(capacity_ * padded(head_dim_) * (is_half ? 2 : 4)) {
    const std::size_t count = layers_ * heads_;  // at most 2^21
    const bool fits = head_bytes_ <= std::numeric_limits<std::size_t>::max() / 2 / count;
    // calloc: large blocks come as untouched zero pages
    keys_.reset(fits ? static_cast<std::uint8_t *>(std::calloc(count, head_bytes_)) : nullptr);
    values_.reset(fits ? static_cast<std::uint8_t *>(std::calloc(count, head_bytes_)) : nullptr);
    if (!keys_ || !values_) {
        throw Error(Fault::usage, "no memory for keys and values", "", "", show(capacity) + " positions",
                    "Ask for a shorter context");
    }
    capacity_ = capacity;
}

std::uint64_t Engine::sequence_bytes() const {
    const ModelConfig &c = model_.config();
    const std::uint64_t heads = static_cast<std::uint64_t>(c.num_hidden_layers * c.num_key_value_heads);
    const std::uint64_t head_bytes = padded(options_.context) * padded(static_cast<std::size_t>(c.head_dim)) *
                                     (options_.half_cache ? 2U : 4U);
    return 2 * heads * head_bytes;
}

}  // namespace irq
