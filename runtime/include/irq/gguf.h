// Reading GGUF strictly: the rules and the verdicts of irq_formats.gguf (reader, header, rules).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "irq/file.h"

namespace irq {

enum class ValueType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// A metadata value. Strings of arrays under "tokenizer." are checked and counted but not kept: the
// engine does not tokenise, and they are most of a header.
struct Value {
    ValueType type = ValueType::u8;
    ValueType element = ValueType::u8;  // of an array
    std::int64_t integer = 0;           // any integer type or bool; u64 above 2^63 - 1 is clamped
    double number = 0;                  // f32, f64, and integers too
    std::string text;                   // string
    std::uint64_t count = 0;            // elements of an array
    std::vector<std::string> strings;   // array of strings
    std::vector<std::uint8_t> raw;      // array of anything else, little-endian
    std::uint64_t digest = 0;           // FNV-1a of the value's bytes in the file

    bool is_integer() const;
    bool is_float() const { return type == ValueType::f32 || type == ValueType::f64; }
};

// Types of ggml that may stand in a file; ids are ggml's.
enum class GgmlType : std::uint32_t { f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q8_0 = 8, i8 = 24, bf16 = 30, q2_0 = 42 };

struct BlockLayout {
    const char *name;
    std::uint32_t elements, bytes;  // of one block; elements 1 for plain types; 0: no such type
};
BlockLayout block_layout(GgmlType type);

struct TensorInfo {
    std::string name;
    std::vector<std::uint64_t> shape;  // numpy order (out, in)
    GgmlType type = GgmlType::f32;
    std::uint64_t offset = 0;  // from the start of its file, bytes
    std::uint64_t nbytes = 0;
    std::size_t shard = 0;
};
std::string show_shape(const std::vector<std::uint64_t> &shape);

struct GgufHeader {
    std::unordered_map<std::string, Value> values;
    std::vector<TensorInfo> infos;  // offsets from the data section
    std::uint64_t alignment = 32;
    std::uint64_t end = 0;  // first byte after the last tensor info
};
// Error: any rule of the container is broken.
GgufHeader parse_header(const File &file);

// A checked file, or all shards of one.
class GgufFile {
public:
    // Checks everything but the tensor data. Shards are opened from the first.
    explicit GgufFile(const std::string &path);

    const std::string &path() const { return files_.front()->path(); }
    const std::unordered_map<std::string, Value> &values() const { return values_; }
    const std::map<std::string, TensorInfo> &tensors() const { return tensors_; }
    const TensorInfo *find(const std::string &name) const;

    // The mapped bytes of a tensor of this file.
    const std::uint8_t *data(const TensorInfo &tensor) const;
    void check_unchanged() const;
    std::uint64_t size() const;  // of all shards, bytes

private:
    void open_shards(const GgufHeader &first);

    std::vector<std::unique_ptr<File>> files_;
    std::unordered_map<std::string, Value> values_;
    std::map<std::string, TensorInfo> tensors_;
};

}  // namespace irq
