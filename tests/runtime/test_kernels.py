"""The native kernels on every instruction set against numpy: bit-equal weights, bounded products."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from instruction_sets import BYTES
from numpy.typing import NDArray
from tolerance import KERNEL_BYTES_NMSE, KERNEL_EXACT_NMSE, KERNEL_FAST_NMSE, UNIT_ROUNDOFF

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.codebooks import CODEBOOKS
from irq_formats.gguf import stock_blocks
from irq_formats.gguf.types import GgmlType
from irq_runtime import _native
from irq_runtime.kernels import block_weight, stock_weight

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

TABLE_ERROR = 0.0045  # of the largest level: 8-bit tables (src/kernels/matrix.cpp)
FEW_TOKENS = 8  # irq/kernels.h: inputs of so many are prepared for gemv
STOCK = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1)
CODECS = [(name, size) for name in CODEBOOKS for size in ((32,) if name == "int8" else (32, 64))]


@dataclass(frozen=True)
class Case:
    """A weight, and what numpy makes of it."""

    native: _native.Weight
    weight: F32  # (out, in)
    terms: F64 | None = None  # (out, in): |scale * level|, blocks only
    tau: F64 | None = None  # (out, in)


def random_blocks(spec: BlockSpec, shape: tuple[int, int], seed: int = 5) -> BlockTensor:
    """Random bytes in every part; scales and offsets of ordinary size, zeros and denormals among them."""
    rng = np.random.default_rng(seed)
    parts: dict[str, NDArray[np.generic]] = {}
    for name, (dtype, size) in part_layout(spec, shape).items():
        if dtype in (np.uint8, np.int8):
            parts[name] = rng.integers(0, 256, size, dtype=np.uint8).view(dtype)
            continue
        spread = 1 if name.startswith("scale") else 0.3
        values = np.abs(rng.normal(0.05, 0.02, size)) if spread == 1 else rng.normal(0, 0.01, size)
        if len(size) == 2 and min(size) > 2:
            values[0, 0], values[1, :], values[2, 1] = 0, 1e-7, 1e-42
        parts[name] = values.astype(dtype)
    return BlockTensor(spec, shape, parts)


def block_case(spec: BlockSpec, shape: tuple[int, int]) -> Case:
    tensor = random_blocks(spec, shape)
    scale = np.repeat(tensor.scale().astype(np.float64), spec.block_size, axis=1)
    tau = np.repeat(tensor.tau().astype(np.float64), spec.block_size, axis=1)
    codes = tensor.codes()
    book = CODEBOOKS[spec.codebook]
    levels = codes.view(np.int8).astype(np.float64) if spec.codebook == "int8" else book.levels[codes]
    return Case(block_weight(tensor), tensor.dequantize(), np.abs(scale * levels), tau)


def stock_case(type_: GgmlType, shape: tuple[int, int]) -> Case:
    rng = np.random.default_rng(6)
    values = rng.normal(0, 0.05, shape).astype(np.float32)
    raw: NDArray[np.generic]
    if type_ == GgmlType.Q4_1:
        blocks = (shape[0], shape[1] // 32)
        d, m = (rng.normal(0, 0.02, blocks).astype(np.float16) for _ in range(2))
        raw = stock_blocks.Q4_1.pack(d, m, rng.integers(0, 16, shape, dtype=np.uint8))
    else:
        raw = stock_blocks.quantize(values, type_)
    return Case(stock_weight(raw, type_, shape[1]), stock_blocks.dequantize(raw, type_))


def same_bits(a: F32, b: F32) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


@pytest.mark.parametrize(("name", "block_size"), CODECS)
def test_weights_are_bit_equal(isa: str, name: str, block_size: int) -> None:
    """Every storage; 67 rows of 5 blocks, so that groups of 256 blocks end inside rows, and odd tails."""
    stored = ("dq8", "f16", "f32")
    for scale, tau, rounding in product(stored, (*stored, "none"), ("fp16", "none")):
        if name == "int8" and (scale, tau) != ("f16", "none"):
            continue
        spec = BlockSpec(name, block_size, scale, tau, rounding)
        tensor = random_blocks(spec, (67, 5 * block_size))
        assert same_bits(block_weight(tensor).dequantize(), tensor.dequantize()), spec


def test_more_blocks_than_the_scale_buffer_holds(isa: str) -> None:
    case = block_case(BlockSpec("nf4", 32), (3, 32 * 1031))
    assert same_bits(case.native.dequantize(), case.weight)
    check_exact(case, tokens=1)
    check_exact(case, tokens=7)


@pytest.mark.parametrize("type_", STOCK)
def test_stock_weights_are_bit_equal(isa: str, type_: GgmlType) -> None:
    columns = 70 if type_ in (GgmlType.F32, GgmlType.F16, GgmlType.BF16) else 96
    case = stock_case(type_, (9, columns))
    assert same_bits(case.native.dequantize(), case.weight)


def test_every_half_float_scale(isa: str) -> None:
    """All finite fp16 patterns, denormals and both zeros, as scales."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    halves = patterns[(patterns & 0x7C00) != 0x7C00].view(np.float16).reshape(-1, 64)
    spec = BlockSpec("int2", 32, "f16", "none")
    shape = (halves.shape[0], 64 * 32)
    codes = np.full((shape[0], shape[1] // 4), 0b11100100, np.uint8)
    tensor = BlockTensor(spec, shape, {"codes": codes, "scale": halves})
    assert same_bits(block_weight(tensor).dequantize(), tensor.dequantize())


def test_every_dynamic_map_entry(isa: str) -> None:
    """All 256 indices, with and without rounding to fp16 (denormal fp16 too)."""
    for rounding, absmax in product(("fp16", "none"), (0.37, 3e-5)):
        spec = BlockSpec("int2", 32, "dq8", "dq8", rounding)
        index = np.arange(256, dtype=np.uint8).reshape(2, 128)
        group = np.array([absmax], np.float32)
        parts: dict[str, NDArray[np.generic]] = {
            "codes": np.full((2, 1024), 0b11100100, np.uint8),
            "scale": index,
            "scale_absmax": group,
            "scale_offset": np.array([absmax / 3], np.float32),
            "tau": index[::-1].copy(),
            "tau_absmax": group,
        }
        tensor = BlockTensor(spec, (2, 4096), parts)
        assert same_bits(block_weight(tensor).dequantize(), tensor.dequantize())


def inputs(tokens: int, columns: int, seed: int = 1) -> F32:
    return np.random.default_rng(seed).normal(0.1, 1, (tokens, columns)).astype(np.float32)


def check_exact(case: Case, tokens: int, parts: int = 1) -> None:
    """Worst-case rounding of a float32 sum of products, and its mean square."""
    x = inputs(tokens, case.weight.shape[1])
    wide, weight = x.astype(np.float64), case.weight.astype(np.float64)
    expected = wide @ weight.T
    actual = case.native.matmul(x, "exact", parts)
    size = np.abs(weight) if case.terms is None or case.tau is None else case.terms + np.abs(case.tau)
    bound = UNIT_ROUNDOFF * (x.shape[1] + 8) * (np.abs(wide) @ size.T)
    assert (np.abs(actual - expected) <= bound).all()
    assert np.mean((actual - expected) ** 2) <= KERNEL_EXACT_NMSE * np.mean(expected**2)


@pytest.mark.parametrize("tokens", [1, 3, 5, 29])
@pytest.mark.parametrize(("name", "block_size"), CODECS)
def test_exact_products(isa: str, name: str, block_size: int, tokens: int) -> None:
    storage = ("f16", "none") if name == "int8" else ("dq8", "dq8")
    check_exact(block_case(BlockSpec(name, block_size, *storage), (71, 19 * block_size)), tokens, parts=3)


@pytest.mark.parametrize("tokens", [1, 29])
@pytest.mark.parametrize("type_", STOCK)
def test_exact_products_of_stock_formats(isa: str, type_: GgmlType, tokens: int) -> None:
    columns = 1187 if type_ in (GgmlType.F32, GgmlType.F16, GgmlType.BF16) else 1184
    check_exact(stock_case(type_, (35, columns)), tokens)


def check_fast(case: Case, spec: BlockSpec, isa: str, tokens: int, parts: int = 1) -> None:
    """Worst-case rounding of inputs and levels, and the mean square of both."""
    assert case.terms is not None
    assert case.tau is not None
    x = inputs(tokens, case.weight.shape[1]).astype(np.float64)
    expected = x @ case.weight.astype(np.float64).T
    actual = case.native.matmul(x.astype(np.float32), "fast", parts)
    # An input is off by half a step of its span or group (in gemv of bytes a whole one: a low code of 128 is
    # stored as 127); a level by at most half a step of the table, or TABLE_ERROR; their product and float32
    # rounding by less than a hundredth of the two.
    blocks = np.abs(case.terms).reshape(len(case.terms), -1, spec.block_size)
    largest = blocks.max(axis=2).repeat(spec.block_size, axis=1)
    if isa not in BYTES:
        step, table_error = half_steps(x, 64, 4094), 1 / 32766
    elif tokens > FEW_TOKENS:
        step, table_error = half_steps(x, 32, 254), TABLE_ERROR
    else:
        step, table_error = half_steps(x, 64, 127 * 256), TABLE_ERROR
    is_exact_table = spec.codebook.startswith("int")
    if is_exact_table:
        table_error = 0.0
    bound = 1.01 * (step @ case.terms.T + np.abs(x) @ (table_error * 2 * largest).T)
    rounding = UNIT_ROUNDOFF * x.shape[1] * (np.abs(x) @ (2 * largest + np.abs(case.tau)).T)
    assert (np.abs(actual - expected) <= bound + rounding).all()
    assert np.mean((actual - expected) ** 2) <= fast_nmse(isa, tokens, is_exact_table) * np.mean(expected**2)


@pytest.mark.parametrize("tokens", [1, 29])
@pytest.mark.parametrize(("name", "block_size"), CODECS)
def test_fast_products(isa: str, name: str, block_size: int, tokens: int) -> None:
    storage = ("f16", "none") if name == "int8" else ("dq8", "dq8")
    spec = BlockSpec(name, block_size, *storage)
    check_fast(block_case(spec, (71, 19 * block_size)), spec, isa, tokens, parts=2)


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize(
    ("name", "block_size", "blocks"), [("nf4", 64, 601), ("nf4", 32, 1031), ("nf3", 64, 1031)]
)
def test_rows_too_wide_to_go_together(isa: str, name: str, block_size: int, blocks: int, rows: int) -> None:
    spec = BlockSpec(name, block_size)
    case = block_case(spec, (rows, blocks * block_size))
    check_exact(case, tokens=1)
    check_fast(case, spec, isa, tokens=1)


def half_steps(x: F64, group: int, steps: int) -> F64:
    """Half a step of every input: the largest of its group over ``steps``."""
    padded = np.zeros((x.shape[0], -(-x.shape[1] // group) * group))
    padded[:, : x.shape[1]] = np.abs(x)
    largest = padded.reshape(x.shape[0], -1, group).max(axis=2)
    return np.repeat(largest / steps, group, axis=1)[:, : x.shape[1]]


def fast_nmse(isa: str, tokens: int, is_exact_table: bool) -> float:
    if isa not in BYTES:
        return KERNEL_FAST_NMSE
    inputs_part = KERNEL_BYTES_NMSE["gemm" if tokens > FEW_TOKENS else "gemv"]
    return inputs_part + (0.0 if is_exact_table else KERNEL_BYTES_NMSE["table"])


@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1])
def test_fast_products_of_stock_formats(isa: str, type_: GgmlType) -> None:
    case = stock_case(type_, (35, 1184))
    for tokens in (1, 29):
        x = inputs(tokens, 1184)
        expected = x.astype(np.float64) @ case.weight.astype(np.float64).T
        actual = case.native.matmul(x, "fast")
        assert np.mean((actual - expected) ** 2) <= fast_nmse(isa, tokens, True) * np.mean(expected**2)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_row_ranges_and_addition(isa: str, mode: str, tokens: int) -> None:
    """Cutting the rows anywhere changes no bit; adding is the sum of two float32."""
    case = block_case(BlockSpec("nf3", 32), (131, 9 * 32))
    x = inputs(tokens, case.weight.shape[1])
    whole = case.native.matmul(x, mode)
    for parts in (2, 5, 131):
        assert same_bits(case.native.matmul(x, mode, parts), whole)
    before = inputs(tokens, 131, seed=2)
    assert same_bits(case.native.matmul(x, mode, 3, before), before + whole)


def test_zero_and_constant_inputs(isa: str) -> None:
    case = block_case(BlockSpec("nf4", 64), (16, 128))
    for mode in ("exact", "fast"):
        assert not case.native.matmul(np.zeros((1, 128), np.float32), mode).any()
    check_exact(case, tokens=1)


def test_wrong_shapes_are_refused() -> None:
    weight = block_case(BlockSpec("nf4", 64), (4, 128)).native
    with pytest.raises(ValueError, match="columns"):
        weight.matmul(np.zeros((1, 64), np.float32), "exact")
    with pytest.raises(ValueError, match="unknown name"):
        weight.matmul(np.zeros((1, 128), np.float32), "slow")
    with pytest.raises(ValueError, match="do not fit"):
        _native.Weight("blocks", "nf4", 64, 128, np.zeros((4, 64), np.uint8)).dequantize()
    with pytest.raises(ValueError, match="unknown name"):
        _native.Weight("blocks", "nf5", 64, 128, np.zeros((4, 64), np.uint8))
    with pytest.raises(ValueError, match="no values"):
        _native.Weight("blocks", "nf4", 0, 128, np.zeros((4, 64), np.uint8))
