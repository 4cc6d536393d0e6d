"""ggml's block types against the gguf package, bit for bit, and against its layouts from the source."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from irq_formats.errors import UnsupportedModel
from irq_formats.gguf import GgmlType, stock_blocks
from irq_formats.gguf.stock_blocks import BF16, Q2_0, Q4_0, Q4_1, Q8_0, dequantize, quantize

Array = np.ndarray[Any, Any]
PEER = gguf.GGMLQuantizationType
SHARED = [t for t in GgmlType if t.name in PEER.__members__]


def bits(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def random_bytes(kind: GgmlType, seed: int = 0) -> Array:
    shape = kind.raw_shape((17, 256))
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, kind.dtype.itemsize), np.uint8)
    return raw.view(kind.dtype)[..., 0]


@pytest.mark.parametrize("kind", SHARED, ids=lambda kind: kind.name)
def test_block_geometry(kind: GgmlType) -> None:
    peer = PEER[kind.name]
    assert int(peer) == kind
    assert gguf.GGML_QUANT_SIZES[peer] == (kind.block_size, kind.block_bytes)


def test_every_type_is_checked() -> None:
    """The PyPI package ends before Q2_0 (id 42, ggml-common.h: 64 elements in 18 bytes)."""
    assert set(GgmlType) - set(SHARED) == {GgmlType.Q2_0}
    assert (GgmlType.Q2_0.block_size, GgmlType.Q2_0.block_bytes) == (64, 18)


@pytest.mark.parametrize("kind", [GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1])
def test_dequantize_random_bytes(kind: GgmlType) -> None:
    """Any bytes, so NaN, infinite and subnormal steps too."""
    raw = random_bytes(kind)
    with np.errstate(all="ignore"):
        peer = gguf.quants.dequantize(raw.view(np.uint8) if kind is GgmlType.BF16 else raw, PEER[kind.name])
    ours = dequantize(raw, kind)
    assert ours.shape == (17, 256)
    assert ours.dtype == np.float32
    assert np.array_equal(np.isnan(ours), np.isnan(peer))
    keep = ~np.isnan(ours)
    assert np.array_equal(bits(ours)[keep], bits(peer)[keep])


def samples() -> Array:
    """float32 (64, 256): wide range, ties, zero, constant, tiny and single-value blocks."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 256)).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 10, (64, 1))).astype(np.float32)
    x[0] = 0
    x[1] = 0.37
    x[2] = -0.37
    x[3] = np.round(x[3] * 4) / 4  # many ties
    x[4] = np.float32(1e-36)
    x[5, ::32] = 100
    x[6] = np.tile(np.arange(-16, 16), 8) / 2
    x[7, 3] = -0.0
    x[8] = 1e-30
    return x


@pytest.mark.parametrize("kind", [GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0])
def test_quantize(kind: GgmlType) -> None:
    x = samples()
    with np.errstate(all="ignore"):
        peer = gguf.quants.quantize(x, PEER[kind.name])
    assert quantize(x, kind).tobytes() == peer.tobytes()


@pytest.mark.parametrize("kind", [GgmlType.Q8_0, GgmlType.Q4_0])
def test_step_without_a_reciprocal(kind: GgmlType) -> None:
    """1 / 1e-44 is infinite; ggml then converts infinity to an integer, which C leaves undefined."""
    x = np.full((1, 32), 1e-42, np.float32)
    assert not dequantize(quantize(x, kind), kind).any()


def test_bf16_of_every_kind_of_float() -> None:
    """Round to nearest even; infinities stay, NaN stay NaN, the largest floats round to infinity."""
    raw = np.random.default_rng(2).integers(0, 2**32, 100_000, np.uint32)
    raw[:6] = 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x3F808000
    x = raw.view(np.float32)
    assert BF16.quantize(x).tobytes() == gguf.quants.quantize(x.reshape(1, -1), PEER.BF16).tobytes()


def test_dequantize_of_quantize_is_close() -> None:
    x = samples()
    absmax = np.abs(x.reshape(-1, 32)).max(axis=1, keepdims=True)
    for kind, step in ((GgmlType.Q8_0, 1 / 127), (GgmlType.Q4_0, 1 / 8)):
        error = np.abs(dequantize(quantize(x, kind), kind) - x).reshape(-1, 32)
        # half a step, a whole one at the clipped end of Q4_0; fp16 rounds d by 2^-11, or by 2^-25 near 0
        bound = absmax * step * (0.5 if kind is GgmlType.Q8_0 else 1.0) + absmax * 2.0**-10 + 127 * 2.0**-25
        assert (error <= bound).all()


class TestPacking:
    def test_q8_0(self) -> None:
        d = np.array([[1.5, -2]], np.float16)
        q = np.arange(-32, 32, dtype=np.int8)[None]
        raw = Q8_0.pack(d, q)
        assert raw.shape == (1, 68)
        assert raw[0, :4].tolist() == [0x00, 0x3E, 0xE0, 0xE1]
        self.check(Q8_0.unpack(raw), (d, q))

    def test_q4_0(self) -> None:
        """Byte j: element j low, element j + 16 high."""
        d = np.array([[1.0]], np.float16)
        q = np.array([[*range(16), *range(15, -1, -1)]], np.uint8)
        raw = Q4_0.pack(d, q)
        assert raw[0, 2:].tolist() == [j | (15 - j) << 4 for j in range(16)]
        self.check(Q4_0.unpack(raw), (d, q))

    def test_q4_1(self) -> None:
        rng = np.random.default_rng(3)
        d, m = rng.standard_normal((2, 5, 4)).astype(np.float16)
        q = rng.integers(0, 16, (5, 128), np.uint8)
        self.check(Q4_1.unpack(Q4_1.pack(d, m, q)), (d, m, q))

    def test_q2_0(self) -> None:
        """Element j: bits 2 (j mod 4) of byte j // 4; value d (q - 1)."""
        d = np.array([[0.5, 3]], np.float16)
        q = np.random.default_rng(4).integers(0, 4, (1, 128), np.uint8)
        raw = Q2_0.pack(d, q)
        assert raw.shape == (1, 36)
        for j in range(64):
            assert raw[0, 2 + j // 4] >> (2 * (j % 4)) & 3 == q[0, j]
        self.check(Q2_0.unpack(raw), (d, q))
        expected = np.repeat(d.astype(np.float32), 64, axis=1) * (q.astype(np.float32) - 1)
        assert np.array_equal(dequantize(raw, GgmlType.Q2_0), expected)

    @pytest.mark.parametrize("kind", [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q2_0])
    def test_pack_undoes_unpack(self, kind: GgmlType) -> None:
        raw = random_bytes(kind, 5).reshape(1, 17, -1)  # any number of leading axes
        codec = getattr(stock_blocks, kind.name)
        assert codec.pack(*codec.unpack(raw)).tobytes() == raw.tobytes()

    def check(self, got: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
        for a, b in zip(got, expected, strict=True):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_types_without_codec() -> None:
    with pytest.raises(UnsupportedModel, match="Q6_K"):
        dequantize(random_bytes(GgmlType.Q6_K), GgmlType.Q6_K)
    with pytest.raises(UnsupportedModel, match="Q4_1"):
        quantize(samples(), GgmlType.Q4_1)
