// irq::MatMulBlocks<KIND> (formats/spec/irq-onnx.md): Y = A W^T with W quantised in blocks.
//
// The kernels run on the codes as onnxruntime mapped them; of scales and taus, the kernel for one token has a copy in
// fewer bytes (narrow_values.h). NF4 and INT4 order the elements inside a block otherwise than the kernels; a
// permutation of A, once a call, makes up for it. INT8 has its sign bits flipped back a few rows at a time, in cache.
#pragma once

#include "irq/kernels.h"
#include "narrow_values.h"
#include "ort.h"

namespace irq::onnx {

struct RowGemv;
struct TiledGemm;

enum Input : std::size_t { input_a, input_codes, input_scale, input_tau, input_count };

class MatMulBlocks {
  public:
    // Checks attributes and constant inputs; throws Refusal. `type` is that of A, scale, tau and Y.
    MatMulBlocks(const Ort &ort, const OrtKernelInfo *info, irq_codebook codebook, ONNXTensorElementDataType type);

    // One call of the node. Safe on several threads at a time.
    void compute(OrtKernelContext *context) const;

    const Ort &ort() const { return ort_; }

  private:
    struct Call;  // what one call shares between its threads

    Matrix weight(const OrtKernelContext *context, const RowGemv *gemv) const;
    void check_values(const Tensor &tensor, Input input) const;
    bool is_half() const { return type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16; }

    void multiply_one(const Call &call, const RowGemv &gemv) const;
    void multiply_few(const Call &call) const;
    void multiply_many(const Call &call, const TiledGemm &gemm) const;
    const float *ordered_input(const Call &call, std::size_t t, float *scratch) const;

    Ort ort_;
    ONNXTensorElementDataType type_;
    Matrix shape_;                      // without pointers
    bool is_checked_[input_count] = {};  // constant, and found good at creation
    NarrowValues scale_, tau_;           // for one token
};

}  // namespace irq::onnx
