#include "ort.h"

#include <type_traits>

namespace irq::onnx {
namespace {

// The place of each function in OrtApi, and its type.
template <int place, class Function>
struct Entry {
    static Function *of(const OrtApi *api) {
        static_assert(std::is_function_v<Function>);
        return reinterpret_cast<Function *>(reinterpret_cast<void (*const *)()>(api)[place]);
    }
};

using Info = const OrtKernelInfo *;
using Context = const OrtKernelContext *;
using TypeAndShape = OrtTensorTypeAndShapeInfo;

using CreateStatus = Entry<0, OrtStatus *(OrtErrorCode, const char *)>;
using CreateCustomOpDomain = Entry<26, OrtStatus *(const char *, OrtCustomOpDomain **)>;
using CustomOpDomainAdd = Entry<27, OrtStatus *(OrtCustomOpDomain *, const OrtCustomOp *)>;
using AddCustomOpDomain = Entry<28, OrtStatus *(OrtSessionOptions *, OrtCustomOpDomain *)>;
using GetTensorMutableData = Entry<51, OrtStatus *(OrtValue *, void **)>;
using GetTensorElementType = Entry<60, OrtStatus *(const TypeAndShape *, ONNXTensorElementDataType *)>;
using GetDimensionsCount = Entry<61, OrtStatus *(const TypeAndShape *, std::size_t *)>;
using GetDimensions = Entry<62, OrtStatus *(const TypeAndShape *, std::int64_t *, std::size_t)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus *(const OrtValue *, TypeAndShape **)>;
using KernelInfoGetAttributeInt64 = Entry<86, OrtStatus *(Info, const char *, std::int64_t *)>;
using KernelInfoGetAttributeString = Entry<87, OrtStatus *(Info, const char *, char *, std::size_t *)>;
using KernelContextGetInputCount = Entry<88, OrtStatus *(Context, std::size_t *)>;
using KernelContextGetInput = Entry<90, OrtStatus *(Context, std::size_t, const OrtValue **)>;
using KernelContextGetOutput =
    Entry<91, OrtStatus *(OrtKernelContext *, std::size_t, const std::int64_t *, std::size_t, OrtValue **)>;
using ReleaseStatus = Entry<93, void(OrtStatus *)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(TypeAndShape *)>;
using KernelInfoGetConstantInput = Entry<249, OrtStatus *(Info, std::size_t, int *, const OrtValue **)>;
using KernelContextParallelFor =
    Entry<274, OrtStatus *(Context, void (*)(void *, std::size_t), std::size_t, std::size_t, void *)>;

}  // namespace

std::string text_of(const Shape &shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return text + ")";
}

void Ort::check(OrtStatus *status) const {
    if (status != nullptr) throw OrtFailure(status);
}

// onnxruntime does not name the attribute.
void Ort::check_attribute(OrtStatus *status, const char *name, const char *kind) const {
    if (status == nullptr) return;
    ReleaseStatus::of(api_)(status);
    throw Refusal(ORT_INVALID_ARGUMENT, std::string("irq: attribute ") + name + " must be " + kind);
}

OrtStatus *Ort::create_status(OrtErrorCode code, const char *message) const {
    return CreateStatus::of(api_)(code, message);
}

OrtCustomOpDomain *Ort::create_domain(const char *name) const {
    OrtCustomOpDomain *domain = nullptr;
    check(CreateCustomOpDomain::of(api_)(name, &domain));
    return domain;
}

void Ort::add_op(OrtCustomOpDomain *domain, const OrtCustomOp *op) const {
    check(CustomOpDomainAdd::of(api_)(domain, op));
}

void Ort::add_domain(OrtSessionOptions *options, OrtCustomOpDomain *domain) const {
    check(AddCustomOpDomain::of(api_)(options, domain));
}

std::int64_t Ort::attribute_int(const OrtKernelInfo *info, const char *name) const {
    std::int64_t value = 0;
    check_attribute(KernelInfoGetAttributeInt64::of(api_)(info, name, &value), name, "an integer");
    return value;
}

std::string Ort::attribute_string(const OrtKernelInfo *info, const char *name) const {
    std::size_t size = 0;  // with the final zero
    check_attribute(KernelInfoGetAttributeString::of(api_)(info, name, nullptr, &size), name, "a string");
    std::string value(size, '\0');
    check(KernelInfoGetAttributeString::of(api_)(info, name, value.data(), &size));
    value.resize(size == 0 ? 0 : size - 1);
    return value;
}

void *Ort::data(const OrtValue *value) const {
    void *data = nullptr;
    check(GetTensorMutableData::of(api_)(const_cast<OrtValue *>(value), &data));  // the C interface has no other
    return data;
}

Tensor Ort::view(const OrtValue *value) const {
    struct Release {
        const OrtApi *api;
        TypeAndShape *type_and_shape;
        ~Release() { ReleaseTensorTypeAndShapeInfo::of(api)(type_and_shape); }
    };
    TypeAndShape *type_and_shape = nullptr;
    check(GetTensorTypeAndShape::of(api_)(value, &type_and_shape));
    const Release release{api_, type_and_shape};
    Tensor tensor{};
    std::size_t rank = 0;
    check(GetTensorElementType::of(api_)(type_and_shape, &tensor.type));
    check(GetDimensionsCount::of(api_)(type_and_shape, &rank));
    tensor.shape.resize(rank);
    check(GetDimensions::of(api_)(type_and_shape, tensor.shape.data(), rank));
    tensor.data = data(value);
    return tensor;
}

bool Ort::constant_input(const OrtKernelInfo *info, std::size_t index, Tensor *tensor) const {
    int is_constant = 0;
    const OrtValue *value = nullptr;
    check(KernelInfoGetConstantInput::of(api_)(info, index, &is_constant, &value));
    if (is_constant == 0 || value == nullptr) return false;
    *tensor = view(value);
    return true;
}

const OrtValue *Ort::value(const OrtKernelContext *context, std::size_t index) const {
    const OrtValue *value = nullptr;
    check(KernelContextGetInput::of(api_)(context, index, &value));
    if (value == nullptr) throw Refusal(ORT_INVALID_ARGUMENT, "input " + std::to_string(index) + " is missing");
    return value;
}

Tensor Ort::input(const OrtKernelContext *context, std::size_t index) const { return view(value(context, index)); }

const void *Ort::input_data(const OrtKernelContext *context, std::size_t index) const {
    return data(value(context, index));
}

bool Ort::has_input(const OrtKernelContext *context, std::size_t index) const {
    std::size_t count = 0;
    check(KernelContextGetInputCount::of(api_)(context, &count));
    if (index >= count) return false;
    const OrtValue *value = nullptr;
    check(KernelContextGetInput::of(api_)(context, index, &value));
    return value != nullptr;
}

void *Ort::output(OrtKernelContext *context, std::size_t index, const Shape &shape) const {
    OrtValue *value = nullptr;
    check(KernelContextGetOutput::of(api_)(context, index, shape.data(), shape.size(), &value));
    return data(value);
}

void Ort::parallel_for(const OrtKernelContext *context, void (*call)(void *, std::size_t), std::size_t count,
                       void *user) const {
    check(KernelContextParallelFor::of(api_)(context, call, count, count, user));
}

}  // namespace irq::onnx
