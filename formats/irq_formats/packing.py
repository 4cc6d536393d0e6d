"""How codes lie in bytes (spec/irq-blocks.md, section 3).

Codes are packed inside their block, never across blocks. For a block of ``B`` codes ``e[0..B-1]``::

    4 bit   B/2 bytes   byte j = e[j] | e[j + B/2] << 4
    2 bit   B/4 bytes   byte j = e[j] | e[j + B/4] << 2 | e[j + B/2] << 4 | e[j + 3B/4] << 6
    3 bit   3B/8 bytes  the low two bits packed as above, then a plane of B/8 bytes: bit i = e[i] >> 2
    8 bit   B bytes     two's complement

Shifting a loaded vector then yields codes in element order: 64 4-bit codes are one 32-byte load, a
mask and a shift; the plane of high bits is an AVX-512 mask register as it stands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["block_bytes", "pack", "unpack"]


def block_bytes(bits: int, block_size: int) -> int:
    """Return the bytes of one packed block."""
    return block_size * bits // 8


def _pack_planes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack 2- or 4-bit codes ``(n, B)`` to ``(n, B * bits / 8)`` bytes, strided."""
    per_byte = 8 // bits
    planes = codes.reshape(codes.shape[0], per_byte, -1)  # (n, per_byte, B / per_byte)
    packed = np.zeros((codes.shape[0], planes.shape[2]), dtype=np.uint8)
    for i in range(per_byte):
        packed |= planes[:, i] << np.uint8(i * bits)
    return packed


def _unpack_planes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Undo :func:`_pack_planes`."""
    mask = np.uint8(2**bits - 1)
    planes = [(packed >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
    return np.concatenate(planes, axis=1)


def pack(codes: NDArray[np.uint8], bits: int, block_size: int) -> NDArray[np.uint8]:
    """Pack codes of whole blocks.

    Args:
        codes: uint8 ``(out, in)``, each below ``2**bits``; ``in % block_size == 0``. For 8 bits the
            two's complement bytes, returned as they are.
        bits: 2, 3, 4 or 8.
        block_size: 32 or 64.

    Returns:
        uint8 ``(out, in * bits / 8)``.
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    out, width = codes.shape
    blocks = np.ascontiguousarray(codes).reshape(-1, block_size)
    if bits == 3:
        high = np.packbits(blocks >> np.uint8(2), axis=1, bitorder="little")
        packed = np.concatenate([_pack_planes(blocks & np.uint8(3), 2), high], axis=1)
    else:
        packed = _pack_planes(blocks, bits)
    return packed.reshape(out, width * bits // 8)


def unpack(packed: NDArray[np.uint8], bits: int, block_size: int) -> NDArray[np.uint8]:
    """Undo :func:`pack`: uint8 ``(out, in * bits / 8)`` to codes uint8 ``(out, in)``."""
    if bits == 8:
        return packed
    out, row_bytes = packed.shape
    blocks = np.ascontiguousarray(packed).reshape(-1, block_bytes(bits, block_size))
    if bits == 3:
        low_bytes = block_size // 4
        high = np.unpackbits(blocks[:, low_bytes:], axis=1, bitorder="little")
        codes = _unpack_planes(blocks[:, :low_bytes], 2) | (high << np.uint8(2))
    else:
        codes = _unpack_planes(blocks, bits)
    return codes.reshape(out, row_bytes * 8 // bits)
