"""One codec per codebook: the executable specification of codes (spec/irq-blocks.md, section 3).

A codec turns weights of whole blocks into codes, codes into bytes, and back. Arrays are ``(out, in)``
for weights and codes, ``(out, nb)`` for scales and offsets, with ``nb = in / block_size``. All
arithmetic is float32 with one rounding per operation (no fused multiply-add).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_formats.codebooks import CODEBOOKS, Codebook
from irq_formats.errors import UnsupportedModel
from irq_formats.packing import pack, unpack

__all__ = ["BlockCodec", "Int8Codec", "block_codec"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_CHUNK_ELEMENTS = 1 << 22  # weights worked on at a time: temporaries stay below 64 MiB


@dataclass(frozen=True)
class BlockCodec:
    """Codec of a 2-, 3- or 4-bit codebook.

    Attributes:
        book: The codebook.
        block_size: Weights per block, 32 or 64.
    """

    book: Codebook
    block_size: int

    def pack(self, codes: U8) -> U8:
        """Pack codes ``(out, in)`` to bytes ``(out, in * bits / 8)``."""
        return pack(codes, self.book.bits, self.block_size)

    def unpack(self, packed: U8) -> U8:
        """Unpack bytes ``(out, in * bits / 8)`` to codes ``(out, in)``."""
        return unpack(packed, self.book.bits, self.block_size)

    def encode(self, weight: F32, scale: F32, tau: F32) -> U8:
        """Choose the code of every weight: the number of thresholds strictly below it.

        Threshold k is ``fl32(fl32(scale * midpoint[k]) + tau)``, so a tie goes to the lower code, as in
        bitsandbytes. Where the scale is zero every weight gets the codebook's zero code.

        Args:
            weight: float32 ``(out, in)``.
            scale: float32 ``(out, nb)``, not negative.
            tau: float32 ``(out, nb)``.

        Returns:
            codes uint8 ``(out, in)``.
        """
        codes = np.zeros(weight.shape, dtype=np.uint8)
        for rows in self._row_chunks(weight.shape):
            blocks = weight[rows].reshape(-1, self.block_size)
            s, t = scale[rows].reshape(-1, 1), tau[rows].reshape(-1, 1)
            chunk = np.zeros(blocks.shape, dtype=np.uint8)
            for midpoint in self.book.midpoints:
                chunk += blocks > s * midpoint + t
            chunk[s[:, 0] == 0] = self.book.zero_code
            codes[rows] = chunk.reshape(codes[rows].shape)
        return codes

    def decode(self, codes: U8, scale: F32, tau: F32) -> F32:
        """Return ``fl32(fl32(scale * levels[code]) + tau)``, float32 ``(out, in)``."""
        weight = np.empty(codes.shape, dtype=np.float32)
        for rows in self._row_chunks(codes.shape):
            levels = self.book.levels[codes[rows]].reshape(-1, self.block_size)
            levels *= scale[rows].reshape(-1, 1)
            levels += tau[rows].reshape(-1, 1)
            weight[rows] = levels.reshape(weight[rows].shape)
        return weight

    def _row_chunks(self, shape: tuple[int, ...]) -> Iterator[slice]:
        step = max(1, _CHUNK_ELEMENTS // max(1, shape[1]))
        return (slice(start, start + step) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class Int8Codec(BlockCodec):
    """Signed 8-bit codes with an fp16 scale, ggml's Q8_0 bit for bit; codes are two's complement."""

    def encode(self, weight: F32, scale: F32, tau: F32) -> U8:
        """Round ``weight / (absmax / 127)`` half away from zero, as ``quantize_row_q8_0_ref`` does.

        The divisor is the unrounded float32 scale (``scale`` is what is stored after rounding to
        fp16), hence ``scale`` must be ``absmax / 127`` in float32. ``tau`` is ignored.
        """
        codes = np.zeros(weight.shape, dtype=np.int8)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        for rows in self._row_chunks(weight.shape):
            blocks = weight[rows].reshape(-1, self.block_size) * inverse[rows].reshape(-1, 1)
            whole = np.trunc(blocks)  # adding a half instead would round 0.5 less 2^-25 up
            whole += np.copysign(np.abs(blocks - whole) >= np.float32(0.5), blocks)
            codes[rows] = whole.astype(np.int8).reshape(codes[rows].shape)
        return codes.view(np.uint8)

    def decode(self, codes: U8, scale: F32, tau: F32) -> F32:
        """Return ``fl32(scale * code)``, float32 ``(out, in)``; ``tau`` is ignored."""
        signed = codes.view(np.int8).astype(np.float32).reshape(-1, self.block_size)
        return (signed * scale.reshape(-1, 1)).reshape(codes.shape)


def block_codec(name: str, block_size: int) -> BlockCodec:
    """Return the codec of a codebook.

    Raises:
        UnsupportedModel: Unknown codebook, or a block size it does not have.
    """
    if name not in CODEBOOKS:
        raise UnsupportedModel("unknown codebook", expected=" | ".join(CODEBOOKS), got=name)
    sizes = (32,) if name == "int8" else (32, 64)
    if block_size not in sizes:
        raise UnsupportedModel(
            f"{name} has no such block size",
            expected=" or ".join(map(str, sizes)),
            got=block_size,
        )
    kind = Int8Codec if name == "int8" else BlockCodec
    return kind(CODEBOOKS[name], block_size)
