"""The operators of domain ``irq`` and what they are made of (spec/irq-onnx.md, sections 1 and 3).

``irq::MatMulBlocks<KIND>(A, codes, scale, tau)`` is ``y = x Wᵀ`` with a block-quantised ``W``. A runtime
that has a kernel for it runs that; every other one inlines the function written here::

    NF4, INT4                             INT8                   NF3, NF2, INT3, INT2
    A ────────┬────────────┐              codes                  codes   zero, not constant
     Reshape (…, nb, B)    │              DequantizeLinear         └─ BitwiseOr ─┘
     MatMul ones     MatMulBnb4 or        │                      Gather from a table of bytes
     MatMul tauᵀ     MatMulNBits          │                      Mul scale, Add tau
            └──── Add ─────┘              MatMul Aᵀ              MatMul Aᵀ, blocks permuted
                   Y                      Y                      Y


The same nodes, without the function around them, are what profile stock contains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from irq_formats.codebooks import CODEBOOKS
from irq_formats.onnx.ops import CONTRIB, DTYPES, Attribute, Ops, annotate

__all__ = ["DOMAIN", "IR_VERSION", "OPSET", "OPSETS", "VERSION", "Operator", "body", "function"]

DOMAIN, VERSION = "irq", 1
IR_VERSION, OPSET = 10, 21
#: Versions of the standard and contrib operators in use.
OPSETS = {"": OPSET, CONTRIB: 1}


@dataclass(frozen=True)
class Operator:
    """One operator, as a model uses it: all its nodes share a body.

    Attributes:
        codebook: How its bytes are read.
        block_size: Weights per block.
        has_tau: Whether there are offsets.
        dtype: ``float32`` or ``float16``: of activations, scales and offsets.
    """

    codebook: str
    block_size: int
    has_tau: bool
    dtype: str = "float32"

    @property
    def op_type(self) -> str:
        """Name of the operator, such as ``MatMulBlocksNF4``."""
        return f"MatMulBlocks{self.codebook.upper()}"


def body(
    operator: Operator,
    ops: Ops,
    a: ir.Value,
    codes: ir.Value,
    scale: ir.Value,
    tau: ir.Value | None,
    *,
    n: Attribute,
    k: Attribute,
) -> ir.Value:
    """Append the nodes of an operator and return its output.

    Args:
        operator: Which one.
        ops: Where to.
        a: T ``(…, K)``.
        codes: uint8, of shape :func:`irq_formats.onnx.codes.codes_shape`.
        scale: T ``(N, nb)``.
        tau: T ``(N, nb)``, or None if the operator has no offsets.
        n: N, a number or a reference to an attribute.
        k: K, likewise.

    Returns:
        T ``(…, N)``.
    """
    if operator.codebook in ("nf4", "int4"):
        return _stock_product(operator, ops, a, codes, scale, tau, n=n, k=k)
    if operator.codebook == "int8":
        rows = ops("Flatten", a, axis=-1)
        return _left_product(ops, _dequantize(operator, ops, codes, scale), rows, a)
    return _look_up(operator, ops, a, codes, scale, tau)


def function(operator: Operator) -> ir.Function:
    """Return an operator's model-local function."""
    names = ["A", "codes", "scale", *(["tau"] if operator.has_tau else [])]
    inputs = [ir.Value(name=name) for name in names]
    a, codes, scale = inputs[:3]
    ops = Ops()
    n, k = (ir.RefAttr(name, name, ir.AttributeType.INT) for name in "NK")
    output = body(operator, ops, a, codes, scale, inputs[3] if operator.has_tau else None, n=n, k=k)
    output.name = "Y"
    graph = ir.Graph(inputs, [output], nodes=ops.nodes, opset_imports=dict(OPSETS))
    attributes = [
        ir.Attr("codebook", ir.AttributeType.STRING, None),
        *(ir.Attr(name, ir.AttributeType.INT, None) for name in ("block_size", "K", "N")),
    ]
    return ir.Function(DOMAIN, operator.op_type, "", graph=graph, attributes=attributes)


def _stock_product(
    operator: Operator,
    ops: Ops,
    a: ir.Value,
    codes: ir.Value,
    scale: ir.Value,
    tau: ir.Value | None,
    *,
    n: Attribute,
    k: Attribute,
) -> ir.Value:
    """A product that onnxruntime has, and tau times the sums of A over blocks."""
    block_size = operator.block_size
    if operator.codebook == "nf4":
        product = ops(
            "MatMulBnb4", a, codes, scale, domain=CONTRIB, K=k, N=n, block_size=block_size, quant_type=1
        )
    else:
        product = ops(
            "MatMulNBits",
            *(a, codes, scale),
            domain=CONTRIB,
            K=k,
            N=n,
            block_size=block_size,
            bits=4,
            accuracy_level=0,
        )
    annotate(product, operator.dtype)
    if tau is None:
        return product
    lead, blocks = ops("Shape", a, end=-1), ops("Shape", tau, start=1)
    blocked = ops("Concat", lead, blocks, ops.const([operator.block_size]), axis=0)
    # ReduceSum errs on empty batches, and so does MatMul with a vector (until onnxruntime 1.32)
    ones = ops.const(np.ones((operator.block_size, 1), operator.dtype))
    sums = ops("Squeeze", ops("MatMul", ops("Reshape", a, blocked, allowzero=1), ones), ops.const([-1]))
    return ops("Add", product, ops("MatMul", sums, ops("Transpose", tau, perm=[1, 0])))


def _dequantize(operator: Operator, ops: Ops, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """Decode int8 codes ``(N, nb, 32)`` to ``(N, K)``: onnxruntime does not fold this into a constant."""
    column = ops("Unsqueeze", scale, ops.const([2]))
    zero = ops("Expand", ops.const(np.array(128, np.uint8)), ops("Shape", column))
    weight = ops("DequantizeLinear", codes, column, zero, axis=2, block_size=operator.block_size)
    return ops("Reshape", weight, ops.const([0, -1]))


def _look_up(
    operator: Operator, ops: Ops, a: ir.Value, codes: ir.Value, scale: ir.Value, tau: ir.Value | None
) -> ir.Value:
    """Decode the matrix in the order of its bytes, and multiply with A in that order.

    A byte j of a block holds the elements j, j + q, j + 2q, j + 3q, q = B/4: its row of the table. The
    sum over A compares equal to itself, so ``zero`` is 0; but no optimiser may know, or it would fold
    the decoded matrix into the model.
    """
    total = ops("ReduceSum", a, keepdims=0)
    zero = ops("Cast", ops("Greater", total, total), to=int(DTYPES["uint8"]))
    index = ops("Cast", ops("BitwiseOr", codes, zero), to=int(DTYPES["int32"]))
    weight = _BYTE_TABLES[operator.codebook](operator, ops, index)  # (N, nb, q, 4)
    weight = ops("Mul", weight, ops("Unsqueeze", scale, ops.const([2, 3])))
    if tau is not None:
        weight = ops("Add", weight, ops("Unsqueeze", tau, ops.const([2, 3])))
    weight = ops("Reshape", weight, ops.const([0, -1]))  # (N, K)
    parts = ops("Reshape", a, ops.const([-1, 4, operator.block_size // 4]))
    shape = ops("Concat", ops.const([-1]), ops("Shape", weight, start=1), axis=0)
    return _left_product(ops, weight, ops("Reshape", ops("Transpose", parts, perm=[0, 2, 1]), shape), a)


def _left_product(ops: Ops, weight: ir.Value, inputs: ir.Value, like: ir.Value) -> ir.Value:
    """Return ``x Wᵀ`` as ``(W xᵀ)ᵀ``: onnxruntime reads a matrix on the left as it lies in memory.

    Args:
        ops: Where to.
        weight: T ``(N, K)``.
        inputs: x, T ``(M, K)``.
        like: T ``(…, K)``: the leading dimensions of the result.
    """
    product = ops("MatMul", weight, ops("Transpose", inputs, perm=[1, 0]))  # (N, M)
    shape = ops("Concat", ops("Shape", like, end=-1), ops("Shape", weight, end=1), axis=0)
    return ops("Reshape", ops("Transpose", product, perm=[1, 0]), shape, allowzero=1)


def _two_bits(operator: Operator, ops: Ops, index: ir.Value) -> ir.Value:
    """Levels of 2-bit codes, T ``(N, nb, q, 4)``; index int32 ``(N, nb, q)``."""
    return ops("Gather", ops.const(_table(operator, CODEBOOKS[operator.codebook].levels)), index, axis=0)


def _three_bits(operator: Operator, ops: Ops, index: ir.Value) -> ir.Value:
    """Levels of 3-bit codes, T ``(N, nb, q, 4)``; index int32 ``(N, nb, q + B/8)``.

    The high bits of the four elements of a byte lie q bits apart. Tables put each at its place
    above the byte, so that the sum is a number below 4096: a row of a table of four levels.
    """
    quarter, eighth = operator.block_size // 4, operator.block_size // 8
    low, high = ops.many("Split", 2, index, ops.const([quarter, eighth]), axis=2)
    planes = ops("Reshape", high, ops.const([0, 0, 4, quarter // 8]))
    offsets = ops.const(np.arange(0, 1024, 256, dtype=np.int32).reshape(4, 1))
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1  # (256, 8)
    places = np.concatenate([bits << plane for plane in range(8, 12)]).astype(np.int32)  # (4 · 256, 8)
    above = ops("Gather", ops.const(places), ops("Add", planes, offsets), axis=0)  # (N, nb, 4, q/8, 8)
    summed = ops("ReduceSum", above, ops.const([2]), keepdims=0)
    row = ops("Add", low, ops("Reshape", summed, ops.const([0, 0, quarter])))
    levels = CODEBOOKS[operator.codebook].levels
    small, large = (ops.const(_table(operator, half)[None]) for half in (levels[:4], levels[4:]))
    is_large = ((np.arange(16)[:, None] >> np.arange(4)) & 1).astype(bool)[:, None]  # (16, 1, 4)
    table = ops("Reshape", ops("Where", ops.const(is_large), large, small), ops.const([4096, 4]))
    return ops("Gather", table, row, axis=0)


def _table(operator: Operator, levels: NDArray[np.float32]) -> NDArray[np.generic]:
    """The four levels that each byte of 2-bit codes stands for, ``(256, 4)``."""
    codes = (np.arange(256)[:, None] >> np.arange(0, 8, 2)) & 3
    table: NDArray[np.generic] = levels[codes].astype(operator.dtype)
    return table


_BYTE_TABLES: dict[str, Callable[[Operator, Ops, ir.Value], ir.Value]] = {
    "nf3": _three_bits,
    "int3": _three_bits,
    "nf2": _two_bits,
    "int2": _two_bits,
}
