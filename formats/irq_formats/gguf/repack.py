"""Block tensors in ggml's own block types (spec/irq-gguf.md, section 5).

Only codes and scales move; the offset tau has no place in a stock type and travels as extra rank of the
adapter. Every code of ours has one code there, so nothing is searched or rounded but the step ``d``:

============  =====  =========================================  ==================================
codebook      type   stored code                                d
============  =====  =========================================  ==================================
int4          Q4_0   q          (d · (code - 8))                scale, exactly
int3          Q4_0   q + 4                                      scale, exactly
int2          Q4_0   q + 6                                      scale, exactly
int2, 64      Q2_0   3 - q      (d · (code - 1))                -scale, exactly
int8          Q8_0   q          (d · code)                      scale, exactly
nf4 nf3 nf2   Q8_0   :data:`NF_TABLES`                          least squares over 32 codes, fp16
============  =====  =========================================  ==================================

Q2_0 holds the levels -1..2; int2 has -2..1: the same levels with the sign turned, hence the negative
step and no shift of tau. The tables of the nf codebooks are one-to-one, so the codes can be read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from irq_formats.blocks import BlockTensor
from irq_formats.codebooks import CODEBOOKS
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.gguf.stock_blocks import Q2_0, Q4_0, Q8_0
from irq_formats.gguf.types import GgmlType

__all__ = ["NF_TABLES", "carrier", "interleave_heads", "repack", "uninterleave_heads", "unpack_codes"]

U8 = NDArray[np.uint8]

#: int8 code of every nf code: the integers that, times the best step, lie nearest to the levels,
#: weighted by how often each level occurs in blocks of 64 normal weights (steps 1 / 124.114, 1 / 118.998
#: and 1 / 98.994 of the scale).
NF_TABLES: dict[str, NDArray[np.int8]] = {
    "nf4": np.array([-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124], dtype=np.int8),
    "nf3": np.array([-119, -57, -26, 0, 19, 40, 67, 119], dtype=np.int8),
    "nf2": np.array([-99, -25, 25, 99], dtype=np.int8),
}

_CHUNK_ELEMENTS = 1 << 20


def carrier(codebook: str, block_size: int, *, q2_0: bool = True) -> GgmlType:
    """Return the stock type that carries a codebook.

    Args:
        codebook: Name of the codebook.
        block_size: 32 or 64.
        q2_0: Use Q2_0 where it fits; llama.cpp reads it since July 2026.
    """
    if codebook in NF_TABLES or codebook == "int8":
        return GgmlType.Q8_0
    return GgmlType.Q2_0 if q2_0 and codebook == "int2" and block_size == 64 else GgmlType.Q4_0


def repack(tensor: BlockTensor, kind: GgmlType) -> U8:
    """Write codes and scales of a tensor as a stock type; tau is left out.

    Args:
        tensor: The tensor, ``(out, in)``.
        kind: What :func:`carrier` returned.

    Returns:
        uint8 ``(out, row bytes)``, rows in the tensor's order.

    Raises:
        UnsupportedModel: A scale is not an fp16 number, or the type does not carry this codebook.
    """
    codes, scale = tensor.codes(), tensor.scale()  # (out, in), (out, nb)
    raw = np.empty((tensor.shape[0], kind.raw_shape(tensor.shape)[1]), np.uint8)
    for rows in _row_chunks(tensor.shape):
        raw[rows] = _repack_rows(tensor, kind, codes[rows], scale[rows])
    return raw


def unpack_codes(raw: U8, codebook: str, kind: GgmlType) -> U8:
    """Read the codes of a tensor back from a stock type: the inverse of :func:`repack`.

    Args:
        raw: uint8 ``(out, row bytes)``.
        codebook: Name of the codebook.
        kind: Type of ``raw``.

    Returns:
        codes uint8 ``(out, in)``.

    Raises:
        MalformedFile: A stored code stands for none of the codebook's codes.
    """
    unpack: Callable[[U8], tuple[NDArray[np.float16], NDArray[np.generic]]] = {
        GgmlType.Q8_0: Q8_0.unpack,
        GgmlType.Q4_0: Q4_0.unpack,
        GgmlType.Q2_0: Q2_0.unpack,
    }[kind]
    stored: U8 = unpack(raw)[1].view(np.uint8)
    if codebook == "int8":
        return stored
    table = _stored_codes(codebook, kind).view(np.uint8)
    inverse = np.full(256, 255, np.uint8)
    inverse[table] = np.arange(table.size, dtype=np.uint8)
    codes: U8 = inverse[stored]
    if (codes == 255).any():
        raise MalformedFile(f"{kind.name} block holds a code that {codebook} does not have")
    return codes


def _row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _stored_codes(codebook: str, kind: GgmlType) -> NDArray[np.int8] | U8:
    """Return the stock type's code of each of our codes, ``(2**bits,)``."""
    book = CODEBOOKS[codebook]
    if kind is GgmlType.Q8_0 and codebook in NF_TABLES:
        return NF_TABLES[codebook]
    if kind is GgmlType.Q4_0 and book.affine and book.bits <= 4:
        return (book.levels + 8).astype(np.uint8)
    if kind is GgmlType.Q2_0 and codebook == "int2":
        return (1 - book.levels).astype(np.uint8)
    raise UnsupportedModel(f"{kind.name} does not carry {codebook}")


def _repack_rows(tensor: BlockTensor, kind: GgmlType, codes: U8, scale: NDArray[np.float32]) -> U8:
    name, block_size = tensor.spec.codebook, tensor.spec.block_size
    if name == "int8":
        return Q8_0.pack(_as_fp16(scale), codes.view(np.int8))
    stored = _stored_codes(name, kind)[codes]
    if kind is GgmlType.Q2_0:
        return Q2_0.pack(-_as_fp16(scale), stored.view(np.uint8))
    scale = np.repeat(scale, block_size // 32, axis=1)  # (rows, in / 32)
    if kind is GgmlType.Q4_0:
        return Q4_0.pack(_as_fp16(scale), stored.view(np.uint8))
    return Q8_0.pack(_fitted_steps(name, codes, scale), stored.view(np.int8))


def _as_fp16(scale: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return the scales as fp16, which must not change them."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if (half.astype(np.float32) != scale).any():
        raise UnsupportedModel(
            "block scales are not fp16 numbers, which is all a stock type can hold",
            expected="scale_rounding fp16 or scale f16",
            got=f"{int((half != scale).sum())} of {scale.size} scales would change",
            hint="Use --profile irq, or merge in floating point with --merge bf16",
        )
    return half


def _fitted_steps(codebook: str, codes: U8, scale: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return the fp16 step of every 32 codes that brings table times step nearest to the levels.

    The squared error is a parabola in the step, so the fp16 number nearest to its vertex is the best.
    """
    sub = codes.reshape(*scale.shape, 32)
    table = NF_TABLES[codebook].astype(np.float64)
    levels = CODEBOOKS[codebook].levels.astype(np.float64)
    across, square = (table * levels)[sub].sum(axis=-1), (table * table)[sub].sum(axis=-1)
    nominal = 1 / table.max()  # blocks of zero codes: any step will do
    step = np.divide(across, square, out=np.full(scale.shape, nominal), where=square > 0)
    fitted: NDArray[np.float16] = (step * scale).astype(np.float16)
    return fitted


def interleave_heads(rows: NDArray[np.generic], head_dim: int) -> NDArray[np.generic]:
    """Put the rows of q or k from Hugging Face's order into that of stock llama files.

    Within each head, row i and row i + head_dim/2, which are rotated together, become neighbours.

    Args:
        rows: ``(heads * head_dim, ...)``.
        head_dim: Rows of one head.
    """
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def uninterleave_heads(rows: NDArray[np.generic], head_dim: int) -> NDArray[np.generic]:
    """Undo :func:`interleave_heads`."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)
