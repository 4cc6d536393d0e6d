"""The native module equals the numpy specification bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from irq_formats.codebooks import CODEBOOKS
from irq_formats.codecs import block_codec
from irq_formats.double_quant import dynamic_map
from irq_runtime import _native

CODECS = [(name, size) for name in CODEBOOKS for size in ((32,) if name == "int8" else (32, 64))]


@pytest.mark.parametrize("name", [name for name in CODEBOOKS if name != "int8"])
def test_header_constants_agree(name: str) -> None:
    np.testing.assert_array_equal(
        _native.levels(name).view(np.uint32), CODEBOOKS[name].levels.view(np.uint32)
    )


def test_header_dynamic_map_agrees() -> None:
    np.testing.assert_array_equal(_native.dynamic_map().view(np.uint32), dynamic_map().view(np.uint32))


@pytest.mark.parametrize(("name", "block_size"), CODECS)
def test_random_bytes_decode_alike(name: str, block_size: int) -> None:
    """Random codes, and scales and offsets of random finite bit patterns (denormals and zeros too)."""
    rng = np.random.default_rng(7)
    rows, nb = 33, 6
    codec = block_codec(name, block_size)
    packed = rng.integers(0, 256, (rows, nb * block_size * codec.book.bits // 8), dtype=np.uint8)
    scale, tau = (  # bit 30 clear: every pattern below 2 in magnitude, denormals included
        (rng.integers(0, 2**32, (rows, nb), dtype=np.uint32) & np.uint32(0xBFFFFFFF)).view(np.float32)
        for _ in range(2)
    )
    scale[0], tau[1] = 0, np.float32(1e-42)
    if name == "int8":
        tau[:] = 0
    expected = codec.decode(codec.unpack(packed), scale, tau)
    actual = _native.dequantize(name, block_size, packed, scale, tau)
    np.testing.assert_array_equal(actual, expected)


def test_shapes_are_checked() -> None:
    good = np.zeros((2, 32), np.uint8), np.ones((2, 1), np.float32), np.ones((2, 1), np.float32)
    assert _native.dequantize("nf4", 64, *good).shape == (2, 64)
    for bad in (
        (good[0][:, :31].copy(), good[1], good[2]),
        (good[0], good[1][:1], good[2]),
        (good[0], good[1], good[2][:1]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            _native.dequantize("nf4", 64, *bad)
    with pytest.raises(ValueError, match="unknown codebook"):
        _native.dequantize("nf5", 64, *good)
    with pytest.raises(ValueError, match="do not fit"):
        _native.dequantize("nf4", 16, *good)
