"""Codes in the byte orders of ONNX operators (spec/irq-onnx.md, section 2).

========== ================== ===========================================================
operator   shape              byte
========== ================== ===========================================================
NF4        (N, K/2)           j of a row:   e[2j] << 4 | e[2j+1]      (MatMulBnb4)
INT4       (N, nb, B/2)       j of a block: e[2j] | e[2j+1] << 4      (MatMulNBits, 4 bits)
INT8       (N, nb, 32)        i of a block: e[i] + 128                (zero point 128)
NF3, INT3  (N, nb, 3B/8)      as in the checkpoint (spec/irq-blocks.md, section 3)
NF2, INT2  (N, nb, B/4)       as in the checkpoint
========== ================== ===========================================================

int3 and int2 may be *carried* by INT4: adding ``8 - 2**(bits-1)`` to a code names the same level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irq_formats.codebooks import CODEBOOKS
from irq_formats.codecs import block_codec
from irq_formats.errors import MalformedFile, UnsupportedModel

__all__ = ["carrier", "codes_shape", "from_onnx", "to_onnx"]

Bytes = NDArray[np.uint8]

_SIGN = np.uint8(0x80)


def carrier(codebook: str, *, carry: bool = True) -> str:
    """Return the codebook of the operator that holds a matrix: int4 for int3 and int2, if asked for."""
    return "int4" if carry and codebook in ("int3", "int2") else codebook


def codes_shape(operator: str, shape: tuple[int, int], block_size: int) -> tuple[int, ...]:
    """Return the shape of the codes of a matrix.

    Args:
        operator: Codebook of the operator.
        shape: ``(N, K)`` of the matrix.
        block_size: Weights per block.
    """
    n, k = shape
    if operator == "nf4":
        return n, k // 2
    return n, k // block_size, block_size * CODEBOOKS[operator].bits // 8


def to_onnx(packed: Bytes, codebook: str, operator: str, block_size: int) -> Bytes:
    """Put the codes of whole rows from the order of the checkpoint into that of an operator.

    Args:
        packed: uint8 ``(rows, K * bits / 8)``, as :func:`irq_formats.packing.pack` returns it.
        codebook: Of the checkpoint.
        operator: Codebook of the operator: ``codebook``, or int4 for int3 and int2.
        block_size: Weights per block.

    Returns:
        uint8, of shape :func:`codes_shape`.

    Raises:
        UnsupportedModel: This operator cannot hold this codebook.
    """
    rows, width = packed.shape[0], packed.shape[1] * 8 // CODEBOOKS[codebook].bits
    shape = codes_shape(operator, (rows, width), block_size)
    if codebook == operator == "int8":
        return (packed ^ _SIGN).reshape(shape)
    if codebook == operator and operator not in ("nf4", "int4"):
        return packed.reshape(shape)
    shift = _shift(codebook, operator)
    codes = block_codec(codebook, block_size).unpack(packed) + shift
    first, second = (np.uint8(4), np.uint8(0)) if operator == "nf4" else (np.uint8(0), np.uint8(4))
    return (codes[:, 0::2] << first | codes[:, 1::2] << second).reshape(shape)


def from_onnx(stored: Bytes, codebook: str, operator: str, block_size: int) -> Bytes:
    """Undo :func:`to_onnx`: uint8 ``(rows, K * bits / 8)``.

    Raises:
        MalformedFile: A carried code is none of its codebook.
        UnsupportedModel: This operator cannot hold this codebook.
    """
    rows = stored.shape[0]
    flat = stored.reshape(rows, -1)
    if codebook == operator == "int8":
        return flat ^ _SIGN
    if codebook == operator and operator not in ("nf4", "int4"):
        return flat
    shift = _shift(codebook, operator)
    low, high = flat & np.uint8(15), flat >> np.uint8(4)
    pair = (high, low) if operator == "nf4" else (low, high)
    codes = np.stack(pair, axis=2).reshape(rows, -1) - shift  # wraps below the first code, seen next
    if (codes >= 2 ** CODEBOOKS[codebook].bits).any():
        raise MalformedFile(f"codes that are none of {codebook}", where=f"carried by {operator}")
    return block_codec(codebook, block_size).pack(codes)


def _shift(codebook: str, operator: str) -> np.uint8:
    """Return what is added to a code: levels ``q - 2**(bits-1)`` and ``c - 8`` are the same."""
    if codebook == operator:
        return np.uint8(0)
    if operator != "int4" or codebook not in ("int3", "int2"):
        raise UnsupportedModel("these codes have no place in this operator", expected=operator, got=codebook)
    return np.uint8(8 - 2 ** (CODEBOOKS[codebook].bits - 1))
