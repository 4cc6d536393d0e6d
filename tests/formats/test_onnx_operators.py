"""Function bodies: through onnxruntime and the reference evaluator, against the decoded matrix."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tiny_checkpoints import random_block_tensor
from tiny_onnx import session_options
from tolerance import ONNX_BODY_FLOAT16, ONNX_BODY_RELATIVE

from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.codebooks import CODEBOOKS
from irq_formats.onnx.codes import carrier, to_onnx
from irq_formats.onnx.operators import DOMAIN, IR_VERSION, OPSETS, VERSION, Operator, body, function
from irq_formats.onnx.ops import DTYPES, Ops

N, K = 24, 192
#: (codebook, carried by int4, block size, offsets)
CASES = [
    *(
        (book, False, size, True)
        for book in ("nf4", "nf3", "nf2", "int4", "int3", "int2")
        for size in (64, 32)
    ),
    *((book, True, 64, True) for book in ("int3", "int2")),
    *((book, False, 64, False) for book in ("nf4", "nf3", "nf2", "int4")),
    ("int8", False, 32, False),
]
SHAPES = [(1, K), (2, 3, K), (2, 1, 5, K), (0, K), (2, 0, K)]


class MatMulBnb4(OpRun):
    """onnxruntime's operator as its documentation has it."""

    op_domain = "com.microsoft"

    def _run(self, a, b, absmax, K, N, block_size, quant_type):
        codes = np.stack([b.reshape(-1) >> 4, b.reshape(-1) & 15], axis=1).reshape(N, K)
        return (a @ (CODEBOOKS["nf4"].levels[codes] * np.repeat(absmax.reshape(N, -1), block_size, 1)).T,)


class MatMulNBits(OpRun):
    """The same, four bits, default zero point."""

    op_domain = "com.microsoft"

    def _run(self, a, b, scales, K, N, bits, block_size, accuracy_level):
        codes = np.stack([b & 15, b >> 4], axis=-1).reshape(N, K).astype(a.dtype)
        return (a @ ((codes - 8) * np.repeat(scales.reshape(N, -1), block_size, 1)).T,)


def block_tensor(codebook: str, block_size: int, has_tau: bool) -> BlockTensor:
    return random_block_tensor(BlockSpec(codebook, block_size, "f16", "f32" if has_tau else "none"), (N, K))


def one_node(tensor: BlockTensor, operator: Operator, rank: int, *, inline: bool) -> onnx.ModelProto:
    codes = tensor.parts["codes"].view(np.uint8)
    arrays = {
        "codes": to_onnx(codes, tensor.spec.codebook, operator.codebook, operator.block_size),
        "scale": tensor.scale().astype(operator.dtype),
        **({"tau": tensor.tau().astype(operator.dtype)} if operator.has_tau else {}),
    }
    weights = [ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in arrays.items()]
    for value in weights:
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    kind = ir.TensorType(DTYPES[operator.dtype])
    dims = [f"d{i}" for i in range(rank - 1)]
    x, ops = ir.Value(name="x", shape=ir.Shape([*dims, K]), type=kind), Ops()
    if inline:
        y = body(operator, ops, x, weights[0], weights[1], weights[2] if operator.has_tau else None, n=N, k=K)
    else:
        attributes = {"codebook": operator.codebook, "block_size": operator.block_size, "K": K, "N": N}
        y = ops(operator.op_type, x, *weights, domain=DOMAIN, **attributes)
    y.name, y.type, y.shape = "y", kind, ir.Shape([*dims, N])
    domains = OPSETS if inline else {**OPSETS, DOMAIN: VERSION}
    graph = ir.Graph([x], [y], nodes=ops.nodes, initializers=weights, opset_imports=domains, name="one")
    functions = [] if inline else [function(operator)]
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=functions))


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize(("codebook", "carried", "block_size", "has_tau"), CASES)
def test_body_computes_the_product_with_the_decoded_matrix(codebook, carried, block_size, has_tau):
    tensor = block_tensor(codebook, block_size, has_tau)
    operator = Operator(carrier(codebook, carry=carried), block_size, has_tau)
    weight = tensor.dequantize().astype(np.float64)
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        x = rng.standard_normal(shape).astype(np.float32)
        for inline in (False, True):
            model = one_node(tensor, operator, len(shape), inline=inline)
            onnx.checker.check_model(model, full_check=True)
            session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
            y = session.run(None, {"x": x})[0]
            assert y.shape == (*shape[:-1], N)
            assert relative(y, x @ weight.T) <= ONNX_BODY_RELATIVE


@pytest.mark.parametrize(("codebook", "carried", "block_size", "has_tau"), CASES)
def test_reference_evaluator_agrees(codebook, carried, block_size, has_tau):
    tensor = block_tensor(codebook, block_size, has_tau)
    operator = Operator(carrier(codebook, carry=carried), block_size, has_tau)
    x = np.random.default_rng(2).standard_normal((2, 3, K)).astype(np.float32)
    is_stock = operator.codebook in ("nf4", "int4")  # the evaluator knows no new operators inside functions
    model = one_node(tensor, operator, 3, inline=is_stock)
    evaluator = ReferenceEvaluator(model, new_ops=[MatMulBnb4, MatMulNBits] if is_stock else None)
    expected = x @ tensor.dequantize().astype(np.float64).T
    assert relative(evaluator.run(None, {"x": x})[0], expected) <= ONNX_BODY_RELATIVE


def test_bodies_are_small():
    """What docs/onnx.md says of their sizes: onnxruntime inlines a body for every matrix."""
    sizes = {}
    for codebook in CODEBOOKS:
        operator = Operator(codebook, 32, codebook != "int8")
        sizes[codebook] = sum(node.op_type != "Constant" for node in function(operator))
    small = {"nf4": 10, "int4": 10, "int8": 13}
    assert sizes == small | {"nf2": 23, "int2": 23, "nf3": 32, "int3": 32}


@pytest.mark.parametrize("codebook", ["nf3", "nf2"])
def test_look_up_weights_are_bit_exact(codebook):
    """Rows of the identity return the decoded matrix itself."""
    tensor = block_tensor(codebook, 64, True)
    model = one_node(tensor, Operator(codebook, 64, True), 2, inline=False)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    y = session.run(None, {"x": np.eye(K, dtype=np.float32)})[0]
    np.testing.assert_array_equal(y, tensor.dequantize().T)


@pytest.mark.parametrize("codebook", ["nf3", "nf2", "int8"])
def test_codes_stay_codes_in_memory(codebook, tmp_path):
    """What onnxruntime would keep after constant folding is written out and still holds no matrix."""
    tensor = block_tensor(codebook, 32 if codebook == "int8" else 64, codebook != "int8")
    operator = Operator(codebook, tensor.spec.block_size, codebook != "int8")
    model = one_node(tensor, operator, 2, inline=False)
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    optimised = onnx.load(tmp_path / "optimised.onnx")
    floats = [t for t in optimised.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert floats
    assert N * K not in {np.prod(tensor.dims) for tensor in floats}


def test_nan_does_not_lift_the_barrier():
    tensor = block_tensor("nf2", 64, True)
    model = one_node(tensor, Operator("nf2", 64, True), 2, inline=False)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    x = np.ones((2, K), np.float32)
    clean = session.run(None, {"x": x})[0]
    x[0, 0] = np.nan
    y = session.run(None, {"x": x})[0]
    assert np.isnan(y[0]).all()
    np.testing.assert_allclose(y[1], clean[1], rtol=1e-6)


@pytest.mark.parametrize("codebook", ["int4", "nf3", "nf2"])
def test_float16(codebook):
    tensor = block_tensor(codebook, 64, True)
    operator = Operator(codebook, 64, True, "float16")
    model = one_node(tensor, operator, 2, inline=False)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(3).standard_normal((4, K)).astype(np.float16)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    y = session.run(None, {"x": x})[0].astype(np.float64)
    assert relative(y, x.astype(np.float64) @ tensor.dequantize().astype(np.float64).T) <= ONNX_BODY_FLOAT16
