// The one exception of the engine: C++ twin of irq_formats.errors.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace irq {

// Classes of irq_formats.errors that the engine can raise. `internal` is a bug or lack of memory.
enum class Fault { internal, usage, malformed, unsupported, wrong_base };

class Error : public std::exception {
public:
    // What went wrong; where (file, tensor, key), what was expected, what was found, what to do.
    Error(Fault fault_, std::string message_, std::string where_ = {}, std::string expected_ = {},
          std::string got_ = {}, std::string hint_ = {})
        : fault(fault_),
          message(std::move(message_)),
          where(std::move(where_)),
          expected(std::move(expected_)),
          got(std::move(got_)),
          hint(std::move(hint_)) {
        text_ = where.empty() ? message : where + ": " + message;
        if (!expected.empty()) text_ += "; expected " + expected;
        if (!got.empty()) text_ += (expected.empty() ? "; got " : ", got ") + got;
        if (!hint.empty()) text_ += ". " + hint;
    }

    const char *what() const noexcept override { return text_.c_str(); }

    Fault fault;
    std::string message, where, expected, got, hint;

private:
    std::string text_;
};

// Text of a number, as messages show it.
template <typename T>
std::string show(const T &value) {
    std::ostringstream out;
    out << value;
    return out.str();
}

}  // namespace irq
