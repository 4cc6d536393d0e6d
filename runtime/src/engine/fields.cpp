#include <cmath>
#include <cstring>

#include "irq/error.h"
#include "irq/model_config.h"

namespace irq {
namespace {

template <typename T>
std::vector<T> elements(const Value &value) {
    std::vector<T> result(value.count);
    if (value.count != 0) std::memcpy(result.data(), value.raw.data(), value.count * sizeof(T));
    return result;
}

template <typename From, typename To>
std::vector<To> widened(const Value &value) {
    const std::vector<From> narrow = elements<From>(value);
    return std::vector<To>(narrow.begin(), narrow.end());
}

}  // namespace

const Value &Fields::get(const std::string &key) const {
    const auto found = values_.find(key);
    if (found == values_.end()) throw Error(Fault::malformed, "required key missing", where_ + ": " + key);
    return found->second;
}

void Fields::wrong(const std::string &key, const std::string &expected) const {
    throw Error(Fault::malformed, "wrong type of value", where_ + ": " + key, expected);
}

std::int64_t Fields::integer(const std::string &key, std::optional<std::int64_t> fallback) const {
    if (fallback && !has(key)) return *fallback;
    const Value &value = get(key);
    if (!value.is_integer()) wrong(key, "an integer");
    return value.integer;
}

double Fields::number(const std::string &key, std::optional<double> fallback) const {
    if (fallback && !has(key)) return *fallback;
    const Value &value = get(key);
    if (!value.is_integer() && !value.is_float()) wrong(key, "a number");
    if (!std::isfinite(value.number)) wrong(key, "a finite number");
    return value.number;
}

bool Fields::boolean(const std::string &key) const {
    const Value &value = get(key);
    if (value.type != ValueType::boolean) wrong(key, "a bool");
    return value.integer != 0;
}

std::string Fields::string(const std::string &key, std::optional<std::string> fallback) const {
    if (fallback && !has(key)) return *fallback;
    const Value &value = get(key);
    if (value.type != ValueType::string) wrong(key, "a string");
    return value.text;
}

const Value &Fields::strings(const std::string &key) const {
    const Value &value = get(key);
    if (value.type != ValueType::array || value.element != ValueType::string) {
        wrong(key, "an array of strings");
    }
    return value;
}

std::vector<std::uint64_t> Fields::unsigned_array(const std::string &key) const {
    const Value &value = get(key);
    if (value.type == ValueType::array) {
        switch (value.element) {
            case ValueType::u8: return widened<std::uint8_t, std::uint64_t>(value);
            case ValueType::u16: return widened<std::uint16_t, std::uint64_t>(value);
            case ValueType::u32: return widened<std::uint32_t, std::uint64_t>(value);
            case ValueType::u64: return elements<std::uint64_t>(value);
            default: break;
        }
    }
    wrong(key, "an array of kind u");
}

std::vector<double> Fields::float_array(const std::string &key) const {
    const Value &value = get(key);
    if (value.type == ValueType::array && value.element == ValueType::f32) return widened<float, double>(value);
    if (value.type == ValueType::array && value.element == ValueType::f64) return elements<double>(value);
    wrong(key, "an array of kind f");
}

std::vector<bool> Fields::bool_array(const std::string &key) const {
    const Value &value = get(key);
    if (value.type != ValueType::array || value.element != ValueType::boolean) wrong(key, "an array of kind b");
    return std::vector<bool>(value.raw.begin(), value.raw.end());
}

}  // namespace irq
