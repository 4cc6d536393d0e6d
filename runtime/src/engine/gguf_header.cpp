// Counts, key-value pairs and tensor infos. Every number is checked against a cap and against the bytes
// that are left before it is used; rules and messages are those of irq_formats/gguf/header.py.
#include <algorithm>
#include <cstring>
#include <limits>

#include "irq/error.h"
#include "irq/gguf.h"
#include "utf8.h"

namespace irq {
namespace {

constexpr std::uint64_t max_keys = 1 << 16, max_tensors = 1 << 17, max_array = 1 << 22;
constexpr std::uint64_t max_key_bytes = (1 << 16) - 1, max_name_bytes = 63, max_string_bytes = 1 << 26;
constexpr std::uint64_t max_alignment = 1 << 20;
constexpr std::uint64_t min_pair_bytes = 8 + 1 + 4 + 1;          // key length, key, type, value
constexpr std::uint64_t min_info_bytes = 8 + 1 + 4 + 8 + 4 + 8;  // name length, name, dims, dim, type, offset
constexpr std::size_t window_bytes = 1 << 18;

std::uint64_t fnv1a(std::uint64_t digest, const std::uint8_t *bytes, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) digest = (digest ^ bytes[i]) * 0x100000001b3u;
    return digest;
}

std::uint32_t scalar_bytes(ValueType type) {
    switch (type) {
        case ValueType::u8: case ValueType::i8: case ValueType::boolean: return 1;
        case ValueType::u16: case ValueType::i16: return 2;
        case ValueType::u32: case ValueType::i32: case ValueType::f32: return 4;
        case ValueType::string: return 8;  // the length alone
        default: return 8;
    }
}

template <typename T>
T load(const std::uint8_t *bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

// Reads forward through a window of the file; nothing is read that is not there.
class Cursor {
public:
    explicit Cursor(const File &file) : file_(file) {}

    std::uint64_t offset() const { return window_offset_ + position_; }
    std::uint64_t remaining() const { return file_.size() - offset(); }
    std::uint64_t file_size() const { return file_.size(); }
    std::uint64_t digest = 0;  // of everything taken since it was last reset

    [[noreturn]] void fail(const std::string &message, const std::string &expected = {},
                           const std::string &got = {}, const std::string &hint = {}) const {
        throw Error(Fault::malformed, message, file_.path(), expected, got, hint);
    }

    // Valid until the next call.
    const std::uint8_t *take(std::uint64_t nbytes, const std::string &what) {
        if (nbytes > window_.size() - position_) {
            if (nbytes > remaining()) {
                fail("the file ends inside " + what, show(nbytes) + " bytes", show(remaining()));
            }
            const std::uint64_t begin = offset();
            window_.resize(std::min(std::max<std::uint64_t>(nbytes, window_bytes), remaining()));
            file_.read(begin, window_.data(), window_.size());
            window_offset_ = begin;
            position_ = 0;
        }
        const std::uint8_t *bytes = window_.data() + position_;
        position_ += nbytes;
        digest = fnv1a(digest, bytes, nbytes);
        return bytes;
    }

    template <typename T>
    T number(const std::string &what) {
        return load<T>(take(sizeof(T), what));
    }

    void check_count(std::uint64_t count, std::uint64_t cap, std::uint64_t item_bytes, const std::string &what) {
        const std::uint64_t limit = std::min(cap, remaining() / item_bytes);
        if (count > limit) fail("too many " + what, "at most " + show(limit), show(count));
    }

    std::string string(std::uint64_t cap, const std::string &what) {
        const auto nbytes = number<std::uint64_t>(what);
        const std::uint64_t limit = std::min(cap, remaining());
        if (nbytes > limit) fail(what + " is too long", "\u2264 " + show(limit) + " bytes", show(nbytes));
        const auto *bytes = take(nbytes, what);
        if (!is_utf8(bytes, nbytes)) fail(what + " is not UTF-8");
        return std::string(reinterpret_cast<const char *>(bytes), nbytes);
    }

    ValueType value_type(const std::string &what) {
        const auto number_ = number<std::uint32_t>(what);
        if (number_ > static_cast<std::uint32_t>(ValueType::f64)) {
            fail("unknown value type of " + what, "0 to 12", show(number_));
        }
        return static_cast<ValueType>(number_);
    }

private:
    const File &file_;
    std::vector<std::uint8_t> window_;
    std::uint64_t window_offset_ = 0;
    std::size_t position_ = 0;
};

bool is_printable_ascii(const std::string &text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

void set_scalar(Value &value, const std::uint8_t *bytes) {
    switch (value.type) {
        case ValueType::u8: case ValueType::boolean: value.integer = load<std::uint8_t>(bytes); break;
        case ValueType::i8: value.integer = load<std::int8_t>(bytes); break;
        case ValueType::u16: value.integer = load<std::uint16_t>(bytes); break;
        case ValueType::i16: value.integer = load<std::int16_t>(bytes); break;
        case ValueType::u32: value.integer = load<std::uint32_t>(bytes); break;
        case ValueType::i32: value.integer = load<std::int32_t>(bytes); break;
        case ValueType::i64: value.integer = load<std::int64_t>(bytes); break;
        case ValueType::u64: {
            constexpr std::uint64_t top = std::numeric_limits<std::int64_t>::max();
            value.integer = static_cast<std::int64_t>(std::min(load<std::uint64_t>(bytes), top));
            break;
        }
        case ValueType::f32: value.number = load<float>(bytes); return;
        case ValueType::f64: value.number = load<double>(bytes); return;
        default: return;
    }
    value.number = static_cast<double>(value.integer);
}

void parse_array(Cursor &cursor, const std::string &key, Value &value) {
    value.element = cursor.value_type("elements of " + key);
    if (value.element == ValueType::array) cursor.fail("array of arrays in " + key);
    value.count = cursor.number<std::uint64_t>("length of " + key);
    const std::uint64_t item_bytes = scalar_bytes(value.element);
    cursor.check_count(value.count, max_array, item_bytes, "elements in " + key);
    if (value.element == ValueType::string) {
        const bool keep = key.rfind("tokenizer.", 0) != 0;
        const std::string what = "a string of " + key;
        for (std::uint64_t i = 0; i < value.count; ++i) {
            std::string text = cursor.string(max_string_bytes, what);
            if (keep) value.strings.push_back(std::move(text));
        }
        return;
    }
    const auto *bytes = cursor.take(value.count * item_bytes, key);
    value.raw.assign(bytes, bytes + value.count * item_bytes);
    if (value.element == ValueType::boolean) {
        for (const auto item : value.raw) {
            if (item > 1) cursor.fail("not a bool: " + key, "0 or 1", show(int{item}));
        }
    }
}

Value parse_value(Cursor &cursor, const std::string &key) {
    Value value;
    value.type = cursor.value_type(key);
    cursor.digest = 0xcbf29ce484222325u;
    if (value.type == ValueType::array) {
        parse_array(cursor, key, value);
    } else if (value.type == ValueType::string) {
        value.text = cursor.string(max_string_bytes, "value of " + key);
    } else {
        set_scalar(value, cursor.take(scalar_bytes(value.type), key));
        if (value.type == ValueType::boolean && value.integer > 1) {
            cursor.fail("not a bool: " + key, "0 or 1", show(value.integer));
        }
    }
    value.digest = cursor.digest;
    return value;
}

void parse_values(Cursor &cursor, std::uint64_t count, GgufHeader &header) {
    for (std::uint64_t index = 0; index < count; ++index) {
        const std::string key = cursor.string(max_key_bytes, "key " + show(index));
        if (key.empty()) cursor.fail("key is empty", "", "key " + show(index));
        if (!is_printable_ascii(key)) cursor.fail("key is not printable ASCII", "", "key " + show(index));
        if (header.values.count(key) != 0) cursor.fail("duplicate key", "", key);
        header.values.emplace(key, parse_value(cursor, key));
    }
    const auto found = header.values.find("general.alignment");
    if (found == header.values.end()) return;
    const Value &value = found->second;
    if (value.type != ValueType::u32) cursor.fail("alignment is not U32");
    const auto alignment = static_cast<std::uint64_t>(value.integer);
    if (alignment < 8 || alignment > max_alignment || (alignment & (alignment - 1)) != 0) {
        cursor.fail("alignment is not a power of two from 8 to " + show(max_alignment), "", show(alignment));
    }
    header.alignment = alignment;
}

// Bounds the element count by the bytes on disk, by division, before anything is multiplied.
std::uint64_t checked_bytes(const Cursor &cursor, const TensorInfo &info, const BlockLayout &layout) {
    std::uint64_t limit = cursor.file_size() / layout.bytes * layout.elements;  // elements
    std::uint64_t elements = 1;
    bool fits = true;
    for (const auto size : info.shape) {
        if (size == 0) cursor.fail("empty dimension of " + info.name, "", show_shape(info.shape));
        limit /= size;
        fits = fits && limit > 0;
        if (fits) elements *= size;
    }
    const std::uint64_t nbytes = elements / layout.elements * layout.bytes;
    if (!fits || nbytes > cursor.file_size()) {
        cursor.fail(info.name + " is larger than the file", "", show_shape(info.shape) + " " + layout.name);
    }
    return nbytes;
}

TensorInfo parse_info(Cursor &cursor, std::uint64_t index) {
    TensorInfo info;
    info.name = cursor.string(max_name_bytes, "name of tensor " + show(index));
    const std::string &name = info.name;
    if (name.empty()) cursor.fail("tensor name is empty", "", "tensor " + show(index));
    if (!is_printable_ascii(name)) {
        // Python lets printable Unicode pass here and refuses it as no tensor of the model.
        cursor.fail("tensor name holds unprintable characters", "", "tensor " + show(index));
    }
    const auto n_dims = cursor.number<std::uint32_t>("dimensions of " + name);
    if (n_dims < 1 || n_dims > 4) {
        cursor.fail("wrong number of dimensions of " + name, "1 to 4", show(n_dims));
    }
    const auto *dims = cursor.take(8 * n_dims, "dimensions of " + name);
    for (std::uint32_t i = n_dims; i-- > 0;) info.shape.push_back(load<std::uint64_t>(dims + 8 * i));
    const auto type_id = cursor.number<std::uint32_t>("type of " + name);
    info.type = static_cast<GgmlType>(type_id);
    const BlockLayout layout = block_layout(info.type);
    if (layout.elements == 0) cursor.fail("unknown tensor type of " + name, "", show(type_id));
    info.offset = cursor.number<std::uint64_t>("offset of " + name);
    if (info.shape.back() % layout.elements != 0) {
        cursor.fail("a row of " + name + " is not a whole number of " + layout.name + " blocks",
                    "a multiple of " + show(layout.elements), show(info.shape.back()));
    }
    info.nbytes = checked_bytes(cursor, info, layout);
    return info;
}

void parse_infos(Cursor &cursor, std::uint64_t count, GgufHeader &header) {
    std::unordered_map<std::string, std::string> seen;  // lower case: name
    for (std::uint64_t index = 0; index < count; ++index) {
        TensorInfo info = parse_info(cursor, index);
        std::string folded = info.name;
        std::transform(folded.begin(), folded.end(), folded.begin(), [](char c) {
            return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
        });
        const auto [other, is_new] = seen.emplace(folded, info.name);
        if (!is_new) {
            const bool same = other->second == info.name;
            cursor.fail(same ? "duplicate tensor" : "tensors differ only by case", "",
                        info.name + " and " + other->second);
        }
        header.infos.push_back(std::move(info));
    }
}

}  // namespace

GgufHeader parse_header(const File &file) {
    Cursor cursor(file);
    std::uint8_t head[24];
    std::memcpy(head, cursor.take(sizeof head, "the GGUF header"), sizeof head);
    if (std::memcmp(head, "GGUF", 4) != 0) cursor.fail("not a GGUF file", "GGUF");
    const auto version = load<std::uint32_t>(head + 4);
    if (version != 2 && version != 3) {  // 2 differs only in not knowing big-endian files
        const bool swapped = version != 0 && (version & 0xffff) == 0;
        cursor.fail("unsupported GGUF version", "2 or 3", show(version),
                    swapped ? "The file is big-endian" : "");
    }
    const auto n_tensors = load<std::uint64_t>(head + 8), n_pairs = load<std::uint64_t>(head + 16);
    cursor.check_count(n_pairs, max_keys, min_pair_bytes, "key-value pairs");
    cursor.check_count(n_tensors, max_tensors, min_info_bytes, "tensors");
    GgufHeader header;
    parse_values(cursor, n_pairs, header);
    parse_infos(cursor, n_tensors, header);
    header.end = cursor.offset();
    return header;
}

}  // namespace irq
