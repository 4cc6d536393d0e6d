// The part of onnxruntime's C interface that a custom-op library needs, declared here so that building needs
// neither its headers nor its library. OrtApi is a table of function pointers that only grows: an entry keeps
// its place for ever, and GetApi(17), which onnxruntime answers from 1.17 on, promises all that ort.cpp names.
// tests/runtime/test_onnx_library.py runs them against several releases (marked slow).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;  // null means success; otherwise owned by whoever receives it
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi;  // an array of function pointers, see irq::onnx::Ort

struct OrtApiBase {
    const OrtApi *(*GetApi)(std::uint32_t version);  // null if onnxruntime is older
    const char *(*GetVersionString)();               // "1.31.1"
};

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_RUNTIME_EXCEPTION = 6, ORT_NOT_IMPLEMENTED = 9 };

enum ONNXTensorElementDataType {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
};

enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

// Version 17 of the structure that a library fills for each operator and type.
struct OrtCustomOp {
    std::uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);  // unused: V2 is set
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp *, std::size_t index);
    std::size_t (*GetInputTypeCount)(const OrtCustomOp *);
    ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp *, std::size_t index);
    std::size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *kernel, OrtKernelContext *);  // unused: V2 is set
    void (*KernelDestroy)(void *kernel);
    OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp *, std::size_t index);
    OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp *, std::size_t index);
    OrtMemType (*GetInputMemoryType)(const OrtCustomOp *, std::size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *context);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
    // Later versions add entries here, which a structure of version 17 is not asked for; room for them all the
    // same, null, should a release look.
    void *later[16];
};

}  // extern "C"
