// The custom-op library under a host that is just large enough: for sanitizers, and for what no release of
// onnxruntime does. Buffers are of exact size. Few tokens and many take different code (row-wise kernels, tiles);
// here they are held to each other, in tests/runtime/test_onnx_library.py to numpy in real onnxruntime.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../src/onnx/ort_abi.h"
#include "irq/codebooks.h"
#include "irq/cpu.h"

struct OrtStatus {
    std::string message;
};
struct OrtValue {
    ONNXTensorElementDataType type;
    std::vector<std::int64_t> shape;
    std::unique_ptr<std::uint8_t[]> data;
};
struct OrtTensorTypeAndShapeInfo {
    const OrtValue *value;
};
struct OrtKernelInfo {
    std::map<std::string, std::int64_t> ints;
    std::map<std::string, std::string> strings;
    std::vector<const OrtValue *> constants;
};
struct OrtKernelContext {
    std::vector<const OrtValue *> inputs;
    OrtValue output;
};
struct OrtCustomOpDomain {
    std::vector<const OrtCustomOp *> ops;
};
struct OrtSessionOptions {
    const OrtCustomOpDomain *domain = nullptr;
};
struct OrtApi {
    void (*entry[275])();
};

extern "C" OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

namespace {

int failures = 0;

void expect(bool good, const std::string &what) {
    if (good) return;
    ++failures;
    std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

std::size_t size_of(ONNXTensorElementDataType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 1;
}

OrtValue make_value(ONNXTensorElementDataType type, std::vector<std::int64_t> shape) {
    std::size_t bytes = size_of(type);
    for (const std::int64_t n : shape) bytes *= static_cast<std::size_t>(n);
    return {type, std::move(shape), std::unique_ptr<std::uint8_t[]>(new std::uint8_t[bytes])};
}

OrtStatus *fail(const char *message) { return new OrtStatus{message}; }

template <class Function>
void set(OrtApi &api, int place, Function *function) {
    api.entry[place] = reinterpret_cast<void (*)()>(function);
}

OrtApi make_api() {
    OrtApi api{};
    set(api, 0, +[](OrtErrorCode, const char *message) { return fail(message); });
    set(api, 26, +[](const char *, OrtCustomOpDomain **out) -> OrtStatus * {
        *out = new OrtCustomOpDomain;
        return nullptr;
    });
    set(api, 27, +[](OrtCustomOpDomain *domain, const OrtCustomOp *op) -> OrtStatus * {
        domain->ops.push_back(op);
        return nullptr;
    });
    set(api, 28, +[](OrtSessionOptions *options, OrtCustomOpDomain *domain) -> OrtStatus * {
        options->domain = domain;
        return nullptr;
    });
    set(api, 51, +[](OrtValue *value, void **data) -> OrtStatus * {
        *data = value->data.get();
        return nullptr;
    });
    using Info = OrtTensorTypeAndShapeInfo;
    set(api, 60, +[](const Info *info, ONNXTensorElementDataType *type) -> OrtStatus * {
        *type = info->value->type;
        return nullptr;
    });
    set(api, 61, +[](const Info *info, std::size_t *rank) -> OrtStatus * {
        *rank = info->value->shape.size();
        return nullptr;
    });
    set(api, 62, +[](const Info *info, std::int64_t *shape, std::size_t rank) -> OrtStatus * {
        for (std::size_t i = 0; i < rank; ++i) shape[i] = info->value->shape[i];
        return nullptr;
    });
    set(api, 65, +[](const OrtValue *value, Info **info) -> OrtStatus * {
        *info = new Info{value};
        return nullptr;
    });
    set(api, 86, +[](const OrtKernelInfo *info, const char *name, std::int64_t *out) -> OrtStatus * {
        const auto found = info->ints.find(name);
        if (found == info->ints.end()) return fail("no such attribute");
        *out = found->second;
        return nullptr;
    });
    set(api, 87, +[](const OrtKernelInfo *info, const char *name, char *out, std::size_t *size) -> OrtStatus * {
        const auto found = info->strings.find(name);
        if (found == info->strings.end()) return fail("no such attribute");
        *size = found->second.size() + 1;
        if (out != nullptr) std::memcpy(out, found->second.c_str(), *size);
        return nullptr;
    });
    set(api, 88, +[](const OrtKernelContext *context, std::size_t *count) -> OrtStatus * {
        *count = context->inputs.size();
        return nullptr;
    });
    set(api, 90, +[](const OrtKernelContext *context, std::size_t i, const OrtValue **out) -> OrtStatus * {
        *out = context->inputs[i];
        return nullptr;
    });
    set(api, 91, +[](OrtKernelContext *context, std::size_t, const std::int64_t *shape, std::size_t rank,
                     OrtValue **out) -> OrtStatus * {
        context->output = make_value(context->inputs[0]->type, {shape, shape + rank});
        *out = &context->output;
        return nullptr;
    });
    set(api, 93, +[](OrtStatus *status) { delete status; });
    set(api, 99, +[](Info *info) { delete info; });
    set(api, 249, +[](const OrtKernelInfo *info, std::size_t i, int *is_constant,
                      const OrtValue **out) -> OrtStatus * {
        *out = i < info->constants.size() ? info->constants[i] : nullptr;
        *is_constant = *out != nullptr;
        return nullptr;
    });
    set(api, 274, +[](const OrtKernelContext *, void (*call)(void *, std::size_t), std::size_t count, std::size_t,
                      void *user) -> OrtStatus * {
        std::thread odd([&] {
            for (std::size_t i = 1; i < count; i += 2) call(user, i);
        });
        for (std::size_t i = 0; i < count; i += 2) call(user, i);
        odd.join();
        return nullptr;
    });
    return api;
}

const OrtApi api = make_api();
std::uint32_t newest = 17;
const char *version = "1.17.0";

const OrtApiBase base = {[](std::uint32_t wanted) { return wanted <= newest ? &api : nullptr; },
                         [] { return version; }};

std::string message_of(OrtStatus *status) {
    const std::unique_ptr<OrtStatus> owned(status);
    return owned == nullptr ? "" : owned->message;
}

constexpr std::int64_t k = 1216, n = 77;  // vectors of blocks, steps of 128 columns and tiles end within

struct Node {
    const OrtCustomOp *op;
    irq_codebook codebook;
    ONNXTensorElementDataType type;
    std::int64_t block;
    OrtValue codes, scale, tau;
    OrtKernelInfo info;
    bool has_tau() const { return codebook != IRQ_INT8; }
};

std::mt19937 engine(5);

// Magnitudes from 1/4 to 1.
void fill(OrtValue &value, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        const bool negative = engine() % 2 != 0;
        if (value.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
            const auto half = static_cast<std::uint16_t>((negative ? 0x8000u : 0u) + 0x3400u + engine() % 0x800u);
            std::memcpy(value.data.get() + 2 * i, &half, 2);
        } else if (value.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            const float x = (negative ? -1.0f : 1.0f) * (0.25f + 0.75f * static_cast<float>(engine() % 1000) / 1000);
            std::memcpy(value.data.get() + 4 * i, &x, 4);
        } else {
            value.data[i] = static_cast<std::uint8_t>(engine());
        }
    }
}

void make_node(Node &node, const OrtCustomOp *op, int codebook, std::int64_t block) {
    node.op = op;
    node.codebook = static_cast<irq_codebook>(codebook);
    node.type = op->GetInputType(op, 0);
    node.block = block;
    const std::int64_t nb = k / block, bytes = k * irq_codebook_bits[codebook] / 8;
    const auto byte = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    node.codes = make_value(byte, {n, nb, bytes / nb});
    if (codebook == IRQ_NF4) node.codes.shape = {n, bytes};
    node.scale = make_value(node.type, {n, nb});
    node.tau = make_value(node.type, {n, nb});
    fill(node.codes, static_cast<std::size_t>(n * bytes));
    fill(node.scale, static_cast<std::size_t>(n * nb));
    fill(node.tau, static_cast<std::size_t>(n * nb));
    node.info.ints = {{"K", k}, {"N", n}, {"block_size", block}};
    node.info.strings = {{"codebook", irq_codebook_name[codebook]}};
    node.info.constants = {nullptr, &node.codes, &node.scale};
    if (node.has_tau()) node.info.constants.push_back(&node.tau);
}

std::string create(const Node &node, void **kernel) {
    return message_of(node.op->CreateKernelV2(node.op, &api, &node.info, kernel));
}

std::vector<float> run(const Node &node, void *kernel, const OrtValue &a, const std::string &what) {
    OrtKernelContext context{{&a, &node.codes, &node.scale}, {}};
    if (node.has_tau()) context.inputs.push_back(&node.tau);
    const std::string message = message_of(node.op->KernelComputeV2(kernel, &context));
    expect(message.empty(), what + ": " + message);
    if (!message.empty()) return {};
    std::vector<float> y(static_cast<std::size_t>(a.shape[0] * n));
    for (std::size_t i = 0; i < y.size(); ++i) {
        if (node.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            std::memcpy(&y[i], context.output.data.get() + 4 * i, 4);
        } else {
            std::uint16_t half;
            std::memcpy(&half, context.output.data.get() + 2 * i, 2);
            const int exponent = half >> 10 & 31, fraction = half & 1023;
            const float digits = static_cast<float>(exponent == 0 ? fraction : fraction + 1024);
            y[i] = std::ldexp(digits, (exponent == 0 ? 1 : exponent) - 25);
            if (half >> 15 != 0) y[i] = -y[i];
        }
    }
    return y;
}

void check_products(const OrtCustomOp *op, int codebook, std::int64_t block) {
    Node node{};
    make_node(node, op, codebook, block);
    const std::string what = std::string(op->GetName(op)) + "/" + std::to_string(block) +
                             (node.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? " float16 " : " float ") +
                             irq::isa_name(irq::active_isa());
    void *kernel = nullptr;
    const std::string message = create(node, &kernel);
    expect(message.empty(), what + ": " + message);
    if (!message.empty()) return;
    constexpr std::int64_t tokens = 21;
    OrtValue a = make_value(node.type, {tokens, k});
    fill(a, tokens * k);
    const std::vector<float> many = run(node, kernel, a, what);
    const double tolerance = node.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 1e-6 : 1e-3;
    double difference = 0, size = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
        OrtValue one = make_value(node.type, {1, k});
        const std::size_t bytes = static_cast<std::size_t>(k) * size_of(node.type);
        std::memcpy(one.data.get(), a.data.get() + static_cast<std::size_t>(t) * bytes, bytes);
        const std::vector<float> single = run(node, kernel, one, what);
        for (std::size_t r = 0; r < single.size(); ++r) {
            const double y = many[static_cast<std::size_t>(t * n) + r];
            difference += (y - single[r]) * (y - single[r]);
            size += y * y;
        }
    }
    expect(difference <= tolerance * tolerance * size, what + ": few and many tokens differ");
    node.op->KernelDestroy(kernel);
}

void check_refusals(const OrtCustomOp *op, int codebook) {
    void *kernel = nullptr;
    const auto refused = [&](const char *part, auto &&spoil) {
        Node node{};
        make_node(node, op, codebook, 32);
        spoil(node);
        const std::string message = create(node, &kernel);
        expect(message.find(part) != std::string::npos, std::string("refusal about ") + part + ": " + message);
    };
    refused("attribute K must be an integer", [](Node &x) { x.info.ints.erase("K"); });
    refused("attribute codebook must be a string", [](Node &x) { x.info.strings.clear(); });
    refused("codebook", [](Node &x) { x.info.strings["codebook"] = std::string(100000, 'x'); });
    refused("block_size", [](Node &x) { x.info.ints["block_size"] = 0; });
    refused("not a multiple", [](Node &x) { x.info.ints["K"] = 33; });
    refused("N must be", [](Node &x) { x.info.ints["N"] = -1; });
    refused("codes must be a constant", [](Node &x) { x.info.constants[1] = nullptr; });
    refused("codes must be uint8", [](Node &x) { x.codes.shape.clear(); });
    refused("codes must be uint8", [](Node &x) { x.codes.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; });
    refused("scale must be", [](Node &x) { x.scale.shape.back() -= 1; });
    if (codebook == IRQ_INT8) return;
    refused("tau must be", [](Node &x) { x.tau.shape = {n * (k / 32)}; });
}

void check_all(const OrtSessionOptions &options) {
    for (std::size_t i = 0; i < options.domain->ops.size(); ++i) {
        const OrtCustomOp *op = options.domain->ops[i];
        const int codebook = static_cast<int>(i / 2);
        check_products(op, codebook, 32);
        if (codebook != IRQ_INT8) check_products(op, codebook, 64);
        check_refusals(op, codebook);
    }
}

}  // namespace

int main() {
    OrtSessionOptions options;
    newest = 16;
    expect(message_of(RegisterCustomOps(&options, &base)).find("1.17") != std::string::npos, "an old onnxruntime");
    newest = 17;
    version = "2.0.0";
    expect(message_of(RegisterCustomOps(&options, &base)).find("before 2.0") != std::string::npos, "a new generation");
    expect(options.domain == nullptr, "nothing registered by then");
    version = "1.17.0";
    expect(message_of(RegisterCustomOps(&options, &base)).empty(), "registration");
    expect(message_of(RegisterCustomOps(&options, &base)).empty(), "registration for a second session");
    expect(options.domain != nullptr && options.domain->ops.size() == 2 * IRQ_CODEBOOK_COUNT, "operators");
    for (const irq::Isa isa : irq::all_isas) {
        if (failures == 0 && irq::set_active_isa(isa)) check_all(options);
    }
    delete options.domain;
    return failures == 0 ? 0 : 1;
}
