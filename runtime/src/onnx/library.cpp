// The entry point that onnxruntime looks up, and the operators it finds: irq::MatMulBlocks<KIND>, version 1, for
// every codebook, once for float and once for float16. The only exported symbol is RegisterCustomOps.
#include <climits>
#include <cstdlib>
#include <new>

#include "matmul_blocks.h"
#include "ort.h"

namespace irq::onnx {
namespace {

// Runs `body` and turns what it throws into a status.
template <class Body>
OrtStatus *guarded(const Ort &ort, Body &&body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const OrtFailure &failure) {
        return failure.status;
    } catch (const Refusal &refusal) {
        return ort.create_status(refusal.code, refusal.what());
    } catch (const std::bad_alloc &) {
        return ort.create_status(ORT_RUNTIME_EXCEPTION, "irq::MatMulBlocks: out of memory");
    } catch (...) {
        return ort.create_status(ORT_FAIL, "irq::MatMulBlocks: unexpected exception");
    }
}

constexpr const char *op_names[IRQ_CODEBOOK_COUNT] = {
    "MatMulBlocksNF4",  "MatMulBlocksNF3",  "MatMulBlocksNF2",  "MatMulBlocksINT4",
    "MatMulBlocksINT3", "MatMulBlocksINT2", "MatMulBlocksINT8",
};

// One operator for one element type. onnxruntime hands the OrtCustomOp back, which is the first member.
struct Op {
    OrtCustomOp table;
    irq_codebook codebook;
    ONNXTensorElementDataType type;
};

const Op &self(const OrtCustomOp *op) { return *reinterpret_cast<const Op *>(op); }

Op make_op(irq_codebook codebook, ONNXTensorElementDataType type) {
    Op op{};
    OrtCustomOp &t = op.table;
    op.codebook = codebook;
    op.type = type;
    t.version = api_version;
    t.GetName = [](const OrtCustomOp *o) { return op_names[self(o).codebook]; };
    t.GetExecutionProviderType = [](const OrtCustomOp *) { return "CPUExecutionProvider"; };
    t.GetInputTypeCount = [](const OrtCustomOp *) { return std::size_t{input_count}; };
    t.GetInputType = [](const OrtCustomOp *o, std::size_t i) {
        return i == input_codes ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : self(o).type;
    };
    t.GetOutputTypeCount = [](const OrtCustomOp *) { return std::size_t{1}; };
    t.GetOutputType = [](const OrtCustomOp *o, std::size_t) { return self(o).type; };
    t.GetInputCharacteristic = [](const OrtCustomOp *, std::size_t i) {
        return i == input_tau ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    t.GetOutputCharacteristic = [](const OrtCustomOp *, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    t.GetInputMemoryType = [](const OrtCustomOp *, std::size_t) { return OrtMemTypeDefault; };
    t.GetVariadicInputMinArity = [](const OrtCustomOp *) { return 0; };
    t.GetVariadicInputHomogeneity = t.GetVariadicInputMinArity;
    t.GetVariadicOutputMinArity = t.GetVariadicInputMinArity;
    t.GetVariadicOutputHomogeneity = t.GetVariadicInputMinArity;
    t.GetStartVersion = [](const OrtCustomOp *) { return 1; };
    t.GetEndVersion = [](const OrtCustomOp *) { return INT_MAX; };
    t.CreateKernelV2 = [](const OrtCustomOp *o, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
        const Ort ort(api);
        return guarded(ort, [&] { *kernel = new MatMulBlocks(ort, info, self(o).codebook, self(o).type); });
    };
    t.KernelComputeV2 = [](void *kernel, OrtKernelContext *context) {
        const auto &matmul = *static_cast<const MatMulBlocks *>(kernel);
        return guarded(matmul.ort(), [&] { matmul.compute(context); });
    };
    t.KernelDestroy = [](void *kernel) { delete static_cast<MatMulBlocks *>(kernel); };
    return op;
}

// Sessions keep pointers to it, so it lives as long as the library.
OrtCustomOpDomain *domain(const Ort &ort) {
    static Op ops[IRQ_CODEBOOK_COUNT][2];
    static OrtCustomOpDomain *const made = [&] {
        OrtCustomOpDomain *domain = ort.create_domain("irq");
        for (int i = 0; i < IRQ_CODEBOOK_COUNT; ++i) {
            const auto codebook = static_cast<irq_codebook>(i);
            ops[i][0] = make_op(codebook, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
            ops[i][1] = make_op(codebook, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
            for (const Op &op : ops[i]) ort.add_op(domain, &op.table);
        }
        return domain;
    }();
    return made;
}

}  // namespace
}  // namespace irq::onnx

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                               const OrtApiBase *base) {
    using namespace irq::onnx;
    const char *version = base->GetVersionString();
    const OrtApi *api = version != nullptr && std::atoi(version) == 1 ? base->GetApi(api_version) : nullptr;
    if (api == nullptr) {  // create_status is entry 0 and has been there since version 1
        const Ort oldest(base->GetApi(1));
        return oldest.create_status(ORT_NOT_IMPLEMENTED, "irq: needs onnxruntime 1.17 or later, and before 2.0");
    }
    const Ort ort(api);
    return guarded(ort, [&] { ort.add_domain(options, domain(ort)); });
}
