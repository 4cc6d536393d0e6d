"""ggml's own tensor types: how elements lie in bytes, and what they mean.

One class per type, bit-equal with ggml's reference code. ``d`` and ``m`` are little-endian float16; a
block is its fields in this order:

====  ========  =====  ==========================================  =============
type  elements  bytes  fields                                      value
====  ========  =====  ==========================================  =============
Q8_0  32        34     d, 32 × int8                                d · q
Q4_0  32        18     d, 16 bytes: q[j] | q[j+16] << 4            d · (q - 8)
Q4_1  32        20     d, m, 16 bytes as Q4_0                      d · q + m
Q2_0  64        18     d, 16 bytes: element j = bits 2(j % 4) of   d · (q - 1)
                       byte j // 4
====  ========  =====  ==========================================  =============

BF16 is the upper half of a float32. Source: ggml ``ggml-common.h``, ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import UnsupportedModel
from irq_formats.gguf.types import GgmlType

__all__ = ["BF16", "F16", "F32", "Q2_0", "Q4_0", "Q4_1", "Q8_0", "dequantize", "quantize"]

Bytes = NDArray[np.uint8]
Half = NDArray[np.float16]
Single = NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)


class F32:
    """float32 as it is."""

    @staticmethod
    def quantize(values: Single) -> Single:
        """Return ``values``."""
        return values

    @staticmethod
    def dequantize(raw: Single) -> Single:
        """Return ``raw``."""
        return raw


class F16:
    """IEEE half precision, round to nearest even; beyond its range infinity."""

    @staticmethod
    def quantize(values: Single) -> Half:
        """Round float32 to float16."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(np.float16)

    @staticmethod
    def dequantize(raw: Half) -> Single:
        """Widen float16 to float32."""
        with np.errstate(invalid="ignore"):
            return raw.astype(np.float32)


class BF16:
    """The upper 16 bits of a float32 (sign, 8 exponent, 7 fraction bits), held as uint16."""

    @staticmethod
    def quantize(values: Single) -> NDArray[np.uint16]:
        """Round float32 to the nearest even bfloat16; NaN stays a (quiet) NaN."""
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = bits + (np.uint32(0x7FFF) + odd)  # NaN may wrap; replaced below
        upper = (rounded >> np.uint32(16)).astype(np.uint16)
        quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
        return np.where(np.isnan(values), quiet, upper)

    @staticmethod
    def dequantize(raw: NDArray[np.uint16]) -> Single:
        """Widen bfloat16 to float32."""
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


class Q8_0:  # noqa: N801  (ggml's own name)
    """32 int8 codes and a float16 step."""

    @staticmethod
    def pack(d: Half, q: NDArray[np.int8]) -> Bytes:
        """Join steps (..., n / 32) and codes (..., n) to bytes (..., n / 32 · 34)."""
        return _join(_half_bytes(d), _split(q, 32).view(np.uint8))

    @staticmethod
    def unpack(raw: Bytes) -> tuple[Half, NDArray[np.int8]]:
        """Undo :meth:`pack`."""
        blocks = _split(raw, 34)
        return _half(blocks, 0), _flat(blocks[..., 2:]).view(np.int8)

    @staticmethod
    def quantize(values: Single) -> Bytes:
        """Round float32 (..., n) to the nearest code, d = max abs / 127."""
        blocks = _split(values, 32)  # (..., nb, 32)
        d = np.abs(blocks).max(axis=-1) / np.float32(127)  # (..., nb)
        scaled = blocks * _reciprocal(d)[..., None]
        whole = np.trunc(scaled)
        away = np.copysign(np.float32(1), scaled) * (np.abs(scaled - whole) >= np.float32(0.5))
        return Q8_0.pack(F16.quantize(d), _flat(whole + away).astype(np.int8))

    @staticmethod
    def dequantize(raw: Bytes) -> Single:
        """Return d · q as float32 (..., n)."""
        d, q = Q8_0.unpack(raw)
        return _scaled(d, q, 32)


class Q4_0:  # noqa: N801  (ggml's own name)
    """32 codes of 4 bits around 8 and a float16 step."""

    @staticmethod
    def pack(d: Half, q: Bytes) -> Bytes:
        """Join steps (..., n / 32) and codes 0…15 (..., n) to bytes (..., n / 32 · 18)."""
        return _join(_half_bytes(d), _pack_nibbles(q))

    @staticmethod
    def unpack(raw: Bytes) -> tuple[Half, Bytes]:
        """Undo :meth:`pack`."""
        blocks = _split(raw, 18)
        return _half(blocks, 0), _unpack_nibbles(blocks[..., 2:])

    @staticmethod
    def quantize(values: Single) -> Bytes:
        """Round float32 (..., n); the largest magnitude gets code 0, so d = it / -8."""
        blocks = _split(values, 32)  # (..., nb, 32)
        largest = np.abs(blocks).argmax(axis=-1)[..., None]
        d: Single = np.take_along_axis(blocks, largest, axis=-1)[..., 0] / np.float32(-8)  # (..., nb)
        shifted = blocks * _reciprocal(d)[..., None] + np.float32(8.5)
        return Q4_0.pack(F16.quantize(d), _flat(shifted.clip(0, 15)).astype(np.uint8))

    @staticmethod
    def dequantize(raw: Bytes) -> Single:
        """Return d · (q - 8) as float32 (..., n)."""
        d, q = Q4_0.unpack(raw)
        return _scaled(d, q.view(np.int8) - np.int8(8), 32)


class Q4_1:  # noqa: N801  (ggml's own name)
    """32 codes of 4 bits, a float16 step and a float16 minimum."""

    @staticmethod
    def pack(d: Half, m: Half, q: Bytes) -> Bytes:
        """Join steps, minima (..., n / 32) and codes 0…15 (..., n) to bytes (..., n / 32 · 20)."""
        return _join(_half_bytes(d), _half_bytes(m), _pack_nibbles(q))

    @staticmethod
    def unpack(raw: Bytes) -> tuple[Half, Half, Bytes]:
        """Undo :meth:`pack`."""
        blocks = _split(raw, 20)
        return _half(blocks, 0), _half(blocks, 2), _unpack_nibbles(blocks[..., 4:])

    @staticmethod
    def dequantize(raw: Bytes) -> Single:
        """Return d · q + m as float32 (..., n), two roundings."""
        d, m, q = Q4_1.unpack(raw)
        with np.errstate(invalid="ignore"):
            return _flat(_split(_scaled(d, q, 32), 32) + F16.dequantize(m)[..., None])


class Q2_0:  # noqa: N801  (ggml's own name)
    """64 codes of 2 bits around 1 and a float16 step (ggml since July 2026)."""

    @staticmethod
    def pack(d: Half, q: Bytes) -> Bytes:
        """Join steps (..., n / 64) and codes 0…3 (..., n) to bytes (..., n / 64 · 18)."""
        quads = q.reshape(*q.shape[:-1], q.shape[-1] // 64, 16, 4)
        packed = quads[..., 0].copy()
        for i in range(1, 4):
            packed |= quads[..., i] << np.uint8(2 * i)
        return _join(_half_bytes(d), packed)

    @staticmethod
    def unpack(raw: Bytes) -> tuple[Half, Bytes]:
        """Undo :meth:`pack`."""
        blocks = _split(raw, 18)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)
        quads = (blocks[..., 2:, None] >> shifts) & np.uint8(3)  # (..., nb, 16, 4)
        return _half(blocks, 0), quads.reshape(*raw.shape[:-1], -1)

    @staticmethod
    def dequantize(raw: Bytes) -> Single:
        """Return d · (q - 1) as float32 (..., n)."""
        d, q = Q2_0.unpack(raw)
        return _scaled(d, q.view(np.int8) - np.int8(1), 64)


_DECODERS: dict[GgmlType, Callable[[Any], Single]] = {
    GgmlType.F32: F32.dequantize,
    GgmlType.F16: F16.dequantize,
    GgmlType.BF16: BF16.dequantize,
    GgmlType.Q8_0: Q8_0.dequantize,
    GgmlType.Q4_0: Q4_0.dequantize,
    GgmlType.Q4_1: Q4_1.dequantize,
    GgmlType.Q2_0: Q2_0.dequantize,
}
_ENCODERS: dict[GgmlType, Callable[[Single], NDArray[Any]]] = {
    GgmlType.F32: F32.quantize,
    GgmlType.F16: F16.quantize,
    GgmlType.BF16: BF16.quantize,
    GgmlType.Q8_0: Q8_0.quantize,
    GgmlType.Q4_0: Q4_0.quantize,
}


def dequantize(raw: NDArray[np.generic], type_: GgmlType, *, where: str | None = None) -> Single:
    """Decode a tensor's raw data, of ``type_.dtype`` and ``type_.raw_shape(shape)``, to float32.

    Raises:
        UnsupportedModel: No decoder for this type.
    """
    decoder = _DECODERS.get(type_)
    if decoder is None:
        raise UnsupportedModel(
            "no decoder for this tensor type",
            where=where,
            expected=", ".join(known.name for known in _DECODERS),
            got=type_.name,
        )
    return decoder(raw)


def quantize(values: Single, type_: GgmlType) -> NDArray[np.generic]:
    """Encode float32 (..., n) as ggml's own reference quantiser does.

    Raises:
        UnsupportedModel: No encoder for this type.
    """
    encoder = _ENCODERS.get(type_)
    if encoder is None:
        raise UnsupportedModel(
            "no encoder for this tensor type",
            expected=", ".join(known.name for known in _ENCODERS),
            got=type_.name,
        )
    return encoder(values)


def _split(rows: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """(..., n) to (..., n / size, size)."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)


def _flat(blocks: NDArray[Scalar]) -> NDArray[Scalar]:
    """(..., nb, size) to (..., nb · size), contiguous."""
    return np.ascontiguousarray(blocks).reshape(*blocks.shape[:-2], -1)


def _half(blocks: Bytes, at: int) -> Half:
    """The float16 field at byte ``at`` of each block: (..., nb)."""
    field: Half = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")
    return field[..., 0]


def _half_bytes(values: Half) -> Bytes:
    """(..., nb) float16 to (..., nb, 2) bytes."""
    return np.ascontiguousarray(values, "<f2")[..., None].view(np.uint8)


def _join(*fields: Bytes) -> Bytes:
    """Fields (..., nb, bytes) to rows of blocks (..., nb · sum of bytes)."""
    return _flat(np.concatenate(fields, axis=-1))


def _pack_nibbles(q: Bytes) -> Bytes:
    """Codes (..., n) to (..., n / 32, 16): element j low, j + 16 high."""
    blocks = _split(q, 32)
    return blocks[..., :16] | blocks[..., 16:] << np.uint8(4)


def _unpack_nibbles(packed: Bytes) -> Bytes:
    """(..., nb, 16) to codes (..., nb · 32)."""
    return _flat(np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1))


def _scaled(d: Half, q: NDArray[np.integer[Any]], block_size: int) -> Single:
    """d[block] · q as float32; inf · 0 and NaN follow IEEE without a warning."""
    values = q.astype(np.float32)
    blocks = _split(values, block_size)
    with np.errstate(invalid="ignore"):
        blocks *= F16.dequantize(d)[..., None]
    return values


def _reciprocal(d: Single) -> Single:
    """1 / d in float32; 0 where d is 0 or too small to have one (its float16 is 0 anyway)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isinf(inverse), np.float32(0), inverse)
