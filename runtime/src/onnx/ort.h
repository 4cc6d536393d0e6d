// onnxruntime's functions by name, over the table of ort_abi.h. Failures become exceptions, which the entry
// points of library.cpp turn back into an OrtStatus: nothing is thrown across the C interface.
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace irq::onnx {

inline constexpr std::uint32_t api_version = 17;  // the lowest with ParallelFor

// A failure that onnxruntime reported itself. Whoever catches it owns the status.
struct OrtFailure : std::exception {
    explicit OrtFailure(OrtStatus *status_) : status(status_) {}
    const char *what() const noexcept override { return "onnxruntime refused a call"; }
    OrtStatus *status;
};

// A failure of ours, with a message for whoever owns the model.
struct Refusal : std::exception {
    Refusal(OrtErrorCode code_, std::string message_) : code(code_), message(std::move(message_)) {}
    const char *what() const noexcept override { return message.c_str(); }
    OrtErrorCode code;
    std::string message;
};

using Shape = std::vector<std::int64_t>;

// "(3, 64)"
std::string text_of(const Shape &shape);

// A view of a tensor that onnxruntime owns.
struct Tensor {
    ONNXTensorElementDataType type;
    Shape shape;
    void *data;
};

class Ort {
  public:
    explicit Ort(const OrtApi *api) : api_(api) {}

    OrtStatus *create_status(OrtErrorCode code, const char *message) const;

    OrtCustomOpDomain *create_domain(const char *name) const;
    void add_op(OrtCustomOpDomain *domain, const OrtCustomOp *op) const;
    void add_domain(OrtSessionOptions *options, OrtCustomOpDomain *domain) const;

    std::int64_t attribute_int(const OrtKernelInfo *info, const char *name) const;
    std::string attribute_string(const OrtKernelInfo *info, const char *name) const;
    // False if input `index` is not a constant of the model.
    bool constant_input(const OrtKernelInfo *info, std::size_t index, Tensor *tensor) const;

    Tensor input(const OrtKernelContext *context, std::size_t index) const;
    bool has_input(const OrtKernelContext *context, std::size_t index) const;  // optional inputs may be missing
    const void *input_data(const OrtKernelContext *context, std::size_t index) const;
    void *output(OrtKernelContext *context, std::size_t index, const Shape &shape) const;

    // Calls task(i) for i in [0, count) on the threads of the session, and waits. `task` must not throw.
    template <class Task>
    void parallel_for(const OrtKernelContext *context, std::size_t count, const Task &task) const {
        const auto call = [](void *user, std::size_t i) { (*static_cast<const Task *>(user))(i); };
        parallel_for(context, call, count, const_cast<Task *>(&task));
    }

  private:
    void parallel_for(const OrtKernelContext *context, void (*call)(void *, std::size_t), std::size_t count,
                      void *user) const;
    const OrtValue *value(const OrtKernelContext *context, std::size_t index) const;
    Tensor view(const OrtValue *value) const;
    void *data(const OrtValue *value) const;
    void check(OrtStatus *status) const;
    void check_attribute(OrtStatus *status, const char *name, const char *kind) const;

    const OrtApi *api_;
};

}  // namespace irq::onnx
