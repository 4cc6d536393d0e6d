"""Single products of the ONNX operators: models, inputs, and what numpy makes of them in float64.

    python tests/onnx_cases.py        all cases on this onnxruntime; IRQ_ISA chooses the instruction set

Everything is written down here a second time, from spec/irq-onnx.md and without irq_formats.onnx.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tolerance import HALF_ROUNDOFF, HALF_SMALLEST, UNIT_ROUNDOFF

from irq_formats.codebooks import CODEBOOKS
from irq_runtime.onnx import register

F64 = NDArray[np.float64]

#: What the function body of a model here computes: nothing like the product.
MARKER = 12345.0

#: Two chunks of columns, the second short; an odd number of rows.
K, N = 320, 77
#: The row-wise kernels (up to 8 tokens), the tiled ones, tiles of unequal size.
TOKENS = (0, 1, 2, 5, 8, 9, 16, 31)


@dataclass(frozen=True)
class Weight:
    """A quantised matrix in ONNX's bytes.

    Attributes:
        codebook: Its codebook, which names the operator.
        block_size: Weights per block.
        codes: uint8, as spec/irq-onnx.md, section 2, has it.
        scale: ``(N, nb)``, float32 or float16.
        tau: The same, or None.
        level: float64 ``(N, K)``: what the codes stand for.
    """

    codebook: str
    block_size: int
    codes: NDArray[np.uint8]
    scale: NDArray[np.floating]
    tau: NDArray[np.floating] | None
    level: F64

    @property
    def op_type(self) -> str:
        return f"MatMulBlocks{self.codebook.upper()}"


def pack(codebook: str, block_size: int, e: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``(N, K)`` to the bytes of the operator."""
    n, k = e.shape
    blocks = e.reshape(n, k // block_size, block_size)
    if codebook == "nf4":
        return e[:, 0::2] << 4 | e[:, 1::2]
    if codebook == "int4":
        return blocks[..., 0::2] | blocks[..., 1::2] << 4
    if codebook == "int8":
        return blocks ^ 0x80
    q = block_size // 4
    low = blocks & 3
    planes = low[..., :q] | low[..., q : 2 * q] << 2 | low[..., 2 * q : 3 * q] << 4 | low[..., 3 * q :] << 6
    if codebook in ("nf2", "int2"):
        return planes
    high = np.packbits(blocks >> 2, axis=-1, bitorder="little")
    return np.concatenate([planes, high], axis=-1)


def random_weight(
    codebook: str,
    block_size: int,
    *,
    n: int = N,
    k: int = K,
    half: bool = False,
    tau: bool = True,
    seed: int = 3,
) -> Weight:
    rng = np.random.default_rng(seed)
    book = CODEBOOKS[codebook]
    e = rng.integers(0, 2**book.bits, (n, k), dtype=np.uint8)
    level = e.view(np.int8).astype(np.float64) if codebook == "int8" else book.levels[e].astype(np.float64)
    dtype = np.float16 if half else np.float32
    shape = (n, k // block_size)
    scale = (rng.random(shape) / np.abs(level).max()).astype(dtype)
    offsets = rng.normal(0, 0.05, shape).astype(dtype) if tau else None
    return Weight(codebook, block_size, pack(codebook, block_size, e), scale, offsets, level)


def marker_function(weight: Weight) -> onnx.FunctionProto:
    """A body under the operator's name that computes 12345."""
    inputs = ["A", "codes", "scale", *(["tau"] if weight.tau is not None else [])]
    nodes = [
        helper.make_node("ReduceMax", ["A"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "m"], ["mm"]),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Constant", [], ["marker"], value_float=MARKER),
        helper.make_node("CastLike", ["zero", "A"], ["z"]),
        helper.make_node("CastLike", ["marker", "A"], ["c"]),
        helper.make_node("Mul", ["mm", "z"], ["none"]),
        helper.make_node("Add", ["none", "c"], ["Y"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    attributes = ["codebook", "block_size", "K", "N"]
    return helper.make_function("irq", weight.op_type, inputs, ["Y"], nodes, opsets, attributes)


def model(weight: Weight, *, dynamic: tuple[str, ...] = (), **attributes: object) -> bytes:
    """One node. Attributes replace the right ones (None: left out); `dynamic` inputs become graph inputs."""
    n, k = weight.level.shape
    kind = TensorProto.FLOAT if weight.scale.dtype == np.float32 else TensorProto.FLOAT16
    values = {"codes": weight.codes, "scale": weight.scale, "tau": weight.tau}
    present = {name: value for name, value in values.items() if value is not None}
    right = {"codebook": weight.codebook, "block_size": weight.block_size, "K": k, "N": n}
    used = {name: value for name, value in {**right, **attributes}.items() if value is not None}
    node = helper.make_node(weight.op_type, ["A", *present], ["Y"], domain="irq", **used)
    kinds = {"A": kind, **{name: helper.np_dtype_to_tensor_dtype(values[name].dtype) for name in dynamic}}
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("Y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in present.items() if name not in dynamic],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("irq", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[marker_function(weight)])
    return made.SerializeToString()


def session(serialized: bytes, *, threads: int = 1, library: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        register(options)
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def product_and_bound(weight: Weight, a: NDArray[np.floating]) -> tuple[F64, F64]:
    """The product in float64, and how far an exact kernel may be from it, element by element."""
    scale = np.repeat(weight.scale.astype(np.float64), weight.block_size, axis=1)
    terms = np.abs(scale * weight.level)
    w = scale * weight.level
    if weight.tau is not None:
        tau = np.repeat(weight.tau.astype(np.float64), weight.block_size, axis=1)
        w, terms = w + tau, terms + np.abs(tau)
    x = a.astype(np.float64)
    y = x @ w.T
    bound = (weight.level.shape[1] + 8) * UNIT_ROUNDOFF * (np.abs(x) @ terms.T)
    if a.dtype == np.float16:
        bound += HALF_ROUNDOFF * np.abs(y) + HALF_SMALLEST
    return y, bound


def inputs(tokens: int, k: int = K, *, half: bool = False, seed: int = 4) -> NDArray[np.floating]:
    values = np.random.default_rng(seed).normal(0, 1, (tokens, k))
    return values.astype(np.float16 if half else np.float32)


def weights() -> Iterator[Weight]:
    """Every codebook, block size and type, with and without offsets."""
    for codebook, half, tau in product(CODEBOOKS, (False, True), (True, False)):
        if codebook == "int8" and tau:
            continue  # has none (spec/irq-blocks.md, section 2)
        for block_size in (32,) if codebook == "int8" else (64, 32):
            yield random_weight(codebook, block_size, half=half, tau=tau)


def check(weight: Weight, *, threads: int = 1, tokens: tuple[int, ...] = TOKENS) -> None:
    """Hold the library to numpy.

    Raises:
        AssertionError: An output is further away than its bound, or came from the function body.
    """
    run = session(model(weight), threads=threads)
    half = weight.scale.dtype == np.float16
    for m in tokens:
        a = inputs(m, weight.level.shape[1], half=half)
        (y,) = run.run(None, {"A": a})
        expected, bound = product_and_bound(weight, a)
        where = f"{weight.op_type}/{weight.block_size} {weight.scale.dtype} M={m} threads={threads}"
        if y.shape != expected.shape or y.dtype != a.dtype:
            raise AssertionError(f"{where}: {y.dtype} {y.shape}")
        excess = np.abs(y - expected) - bound
        if m and excess.max() > 0:
            raise AssertionError(f"{where}: {excess.max()} beyond the bound at {excess.argmax()}")


def check_rounding() -> None:
    """Hold float16 outputs to numpy's rounding, bit for bit: products of two float16 are exact in float32.

    Raises:
        AssertionError: One is rounded otherwise.
    """
    rng = np.random.default_rng(6)
    weight = random_weight("int4", 64, k=64, half=True, tau=False)
    codes = np.full((N, 64), 8, np.uint8)  # the level 0, and 1 in the first column
    codes[:, 0] = 9
    bits = rng.integers(0, 0x7C00, (N + 40,)) | rng.integers(0, 2, (N + 40,)) << 15  # finite
    values = bits.astype(np.uint16).view(np.float16)
    weight = replace(weight, codes=pack("int4", 64, codes), scale=values[:N, None])
    a = np.zeros((40, 64), np.float16)
    a[:, 0] = values[N:]
    with np.errstate(over="ignore"):
        expected = (a[:, :1].astype(np.float32) * weight.scale[:, 0].astype(np.float32)).astype(np.float16)
    for m in (1, 40):
        (y,) = session(model(weight)).run(None, {"A": a[:m]})
        if not np.array_equal(y, expected[:m]):
            raise AssertionError(f"rounding of float16, M={m}")


def check_all() -> int:
    """Run every weight, with one thread and two in turn; return how many."""
    wide = random_weight("nf4", 64, n=130, k=1088)
    cases = [*weights(), replace(wide, scale=-wide.scale)]
    for i, weight in enumerate(cases):
        check(weight, threads=1 + i % 2)
    check_rounding()
    return len(cases)


if __name__ == "__main__":
    sys.stdout.write(f"{onnxruntime.__version__} {check_all()}\n")
