// The table of block-quantised matrices: declared parts, and the value of every scale and offset.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

#include "half.h"
#include "irq/error.h"
#include "payload.h"

namespace irq {
namespace {

struct Entry {
    std::string name, where, codebook, scale, tau, rounding;
    std::uint64_t block_size, rows, columns;
};

[[noreturn]] void malformed(const std::string &message, const std::string &where, const std::string &expected = {},
                            const std::string &got = {}) {
    throw Error(Fault::malformed, message, where, expected, got);
}

Storage storage_of(const std::string &name) {
    if (name == "dq8") return Storage::dq8;
    if (name == "f16") return Storage::f16;
    if (name == "f32") return Storage::f32;
    return Storage::none;
}

std::vector<Entry> read_table(const GgufFile &gguf) {
    const Fields fields(gguf.values(), gguf.path());
    const auto &names = fields.strings("irq.blocks.name").strings;
    const auto strings = [&](const char *key) -> const std::vector<std::string> & {
        const auto &values = fields.strings(std::string("irq.blocks.") + key).strings;
        if (values.size() != names.size()) {
            malformed("parallel arrays differ in length", gguf.path() + ": irq.blocks: " + key, show(names.size()),
                      show(values.size()));
        }
        return values;
    };
    const auto numbers = [&](const char *key) {
        auto values = fields.unsigned_array(std::string("irq.blocks.") + key);
        if (values.size() != names.size()) {
            malformed("parallel arrays differ in length", gguf.path() + ": irq.blocks: " + key, show(names.size()),
                      show(values.size()));
        }
        return values;
    };
    const auto &codebook = strings("codebook"), &scale = strings("scale"), &tau = strings("tau"),
               &rounding = strings("scale_rounding");
    const auto block_size = numbers("block_size"), out = numbers("out"), in = numbers("in");
    std::vector<Entry> entries;
    std::set<std::string> seen;
    for (std::size_t i = 0; i < names.size(); ++i) {
        if (!seen.insert(names[i]).second) {
            malformed("listed twice", gguf.path() + ": irq.blocks.name", "", names[i]);
        }
        entries.push_back({names[i], gguf.path() + ": " + names[i], codebook[i], scale[i], tau[i], rounding[i],
                           block_size[i], out[i], in[i]});
    }
    return entries;
}

Matrix declared(const Entry &entry) {
    const auto *const end = std::end(irq_codebook_name);
    const auto *const found = std::find(std::begin(irq_codebook_name), end, entry.codebook);
    if (found == end) malformed("unknown codebook", entry.where, "", entry.codebook);
    Matrix matrix;
    matrix.format = Format::blocks;
    matrix.codebook = static_cast<irq_codebook>(found - std::begin(irq_codebook_name));
    matrix.block_size = entry.block_size;
    matrix.rows = entry.rows;
    matrix.columns = entry.columns;
    matrix.scale.storage = storage_of(entry.scale);
    matrix.tau.storage = storage_of(entry.tau);
    const bool is_int8 = matrix.codebook == IRQ_INT8;
    if (matrix.scale.storage == Storage::none) malformed("unknown scale storage", entry.where, "", entry.scale);
    if (matrix.tau.storage == Storage::none && entry.tau != "none") {
        malformed("unknown tau storage", entry.where, "", entry.tau);
    }
    if (entry.rounding != "fp16" && entry.rounding != "none") {
        malformed("unknown scale_rounding storage", entry.where, "fp16 | none", entry.rounding);
    }
    if (is_int8 && (entry.scale != "f16" || entry.tau != "none")) {
        malformed("int8 is Q8_0", entry.where, "scale f16, tau none", entry.scale + ", " + entry.tau);
    }
    if (entry.block_size != 32 && (entry.block_size != 64 || is_int8)) {
        malformed("unknown block size", entry.where, is_int8 ? "32" : "32 | 64", show(entry.block_size));
    }
    if (entry.rows == 0 || entry.columns == 0 || entry.columns % entry.block_size != 0) {
        malformed("tensor does not divide into blocks", entry.where, "",
                  show_shape({entry.rows, entry.columns}));
    }
    matrix.scale.round_to_f16 = matrix.scale.storage == Storage::dq8 && entry.rounding == "fp16";
    return matrix;
}

template <typename T>
void check_values(const T *values, std::size_t count, bool may_be_negative, const std::string &where) {
    bool finite = true, negative = false;
    for (std::size_t i = 0; i < count; ++i) {
        float value;
        if constexpr (sizeof(T) == 2) value = from_half(values[i]);
        else value = values[i];
        finite = finite && std::isfinite(value);
        negative = negative || value < 0;
    }
    if (!finite) malformed("part is not finite", where);
    if (negative && !may_be_negative) malformed("part has a negative value", where);
}

// Effective values of a dq8 group lie between those of its smallest and its largest index.
void check_dq8(const BlockValues &part, std::size_t count, bool may_be_negative, const std::string &where) {
    const auto *index = static_cast<const std::uint8_t *>(part.values);
    const auto zero = static_cast<std::uint8_t>(
        std::lower_bound(std::begin(irq_dynamic_map), std::end(irq_dynamic_map), 0.0F) - irq_dynamic_map);
    const float limit = part.round_to_f16 ? 65520.0F : std::numeric_limits<float>::infinity();
    for (std::size_t begin = 0, group = 0; begin < count; begin += IRQ_GROUP_SIZE, ++group) {
        const std::size_t end = std::min<std::size_t>(begin + IRQ_GROUP_SIZE, count);
        std::uint8_t low = 255, high = 0;
        for (std::size_t i = begin; i < end; ++i) {
            low = std::min(low, index[i]);
            high = std::max(high, index[i]);
        }
        const float absmax = part.absmax[group];
        if (absmax == 0 && (low != zero || high != zero)) {
            malformed("a group whose absmax is 0 has non-zero codes", where, "index " + show(int{zero}) + " throughout");
        }
        const float least = irq_dynamic_map[low] * absmax + part.offset;
        const float most = irq_dynamic_map[high] * absmax + part.offset;
        if (!(std::abs(least) < limit && std::abs(most) < limit) ||
            (!may_be_negative && (part.round_to_f16 ? from_half(to_half(least)) : least) < 0)) {
            malformed(may_be_negative ? "a block offset is not finite"
                                      : "a block scale is negative or not finite", where);
        }
    }
}

class PartReader {
public:
    PartReader(const GgufFile &gguf, const Entry &entry, std::set<std::string> &known)
        : gguf_(gguf), entry_(entry), known_(known) {}

    const std::uint8_t *part(const std::string &part, GgmlType type, std::vector<std::uint64_t> shape) {
        const std::string name = entry_.name + "." + part;
        const TensorInfo *tensor = gguf_.find(name);
        if (tensor == nullptr) malformed("tensor missing", gguf_.path() + ": " + name);
        if (tensor->type != type || tensor->shape != shape) {
            malformed("tensor is not as declared", gguf_.path() + ": " + name,
                      block_layout(type).name + (" " + show_shape(shape)),
                      block_layout(tensor->type).name + (" " + show_shape(tensor->shape)));
        }
        known_.insert(name);
        return gguf_.data(*tensor);
    }

    void values(const std::string &name, BlockValues &values, std::uint64_t blocks_per_row) {
        const bool is_tau = name == "tau";
        const std::uint64_t count = entry_.rows * blocks_per_row;  // both bounded: codes were there
        const std::string where = entry_.where + "." + name;
        const std::vector<std::uint64_t> shape{entry_.rows, blocks_per_row};
        if (values.storage == Storage::none) return;
        const GgmlType type = values.storage == Storage::dq8   ? GgmlType::i8
                              : values.storage == Storage::f16 ? GgmlType::f16
                                                               : GgmlType::f32;
        values.values = part(name, type, shape);
        if (values.storage == Storage::f16) {
            check_values(static_cast<const std::uint16_t *>(values.values), count, is_tau, where);
        } else if (values.storage == Storage::f32) {
            check_values(static_cast<const float *>(values.values), count, is_tau, where);
        } else {
            const std::uint64_t groups = (count + IRQ_GROUP_SIZE - 1) / IRQ_GROUP_SIZE;
            values.absmax = reinterpret_cast<const float *>(part(name + "_absmax", GgmlType::f32, {groups}));
            check_values(values.absmax, groups, false, where + "_absmax");
            if (!is_tau) {
                std::memcpy(&values.offset, part("scale_offset", GgmlType::f32, {1}), sizeof values.offset);
                check_values(&values.offset, 1, true, where + "_offset");
            }
            check_dq8(values, count, is_tau, where);
        }
    }

private:
    const GgufFile &gguf_;
    const Entry &entry_;
    std::set<std::string> &known_;
};

}  // namespace

std::map<std::string, Matrix> read_blocks(const GgufFile &gguf, std::set<std::string> &known) {
    std::map<std::string, Matrix> blocks;
    for (const Entry &entry : read_table(gguf)) {
        Matrix matrix = declared(entry);
        PartReader reader(gguf, entry, known);
        const auto bits = static_cast<std::uint64_t>(irq_codebook_bits[matrix.codebook]);
        matrix.data = reader.part("codes", GgmlType::i8, {entry.rows, entry.columns / 8 * bits});
        const std::uint64_t blocks_per_row = entry.columns / entry.block_size;
        reader.values("scale", matrix.scale, blocks_per_row);
        reader.values("tau", matrix.tau, blocks_per_row);
        if (!is_valid(matrix)) malformed("this matrix cannot be computed with", entry.where);
        blocks.emplace(entry.name + ".weight", matrix);
    }
    return blocks;
}

}  // namespace irq
