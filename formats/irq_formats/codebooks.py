"""The codebooks: which value a code stands for (spec/irq-blocks.md, section 2).

A weight is decoded as ``w = scale * levels[code] + tau``. Codebooks are frozen float32 constants:

* ``nf4``: the sixteen constants of bitsandbytes (QLoRA, arXiv 2305.14314, appendix E);
* ``nf3``, ``nf2``: IR-QLoRA (arXiv 2402.05445), tables 12 and 13; nf2 is symmetric, without a zero;
* ``int4``, ``int3``, ``int2``: affine, ``levels[q] = q - 2**(k-1)``;
* ``int8``: signed, ``levels[q] = q``; with block 32 and an fp16 scale it is ggml's Q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODEBOOKS", "Codebook"]


@dataclass(frozen=True)
class Codebook:
    """One codebook.

    Attributes:
        name: The name in every file, such as ``nf4``.
        bits: Bits per code.
        levels: float32 ``(2**bits,)``, ascending; ``levels[code]`` is the decoded value at scale 1.
        zero_code: The code chosen where the scale is zero (its level is 0; nf2 has none: code 0).
        affine: True for int-k, where the levels are consecutive integers.
    """

    name: str
    bits: int
    levels: NDArray[np.float32]
    zero_code: int
    affine: bool

    @property
    def midpoints(self) -> NDArray[np.float32]:
        """float32 ``(2**bits - 1,)``: decision thresholds at scale 1, each rounded to float32."""
        return ((self.levels[:-1] + self.levels[1:]) / np.float32(2)).astype(np.float32)


def _nf(name: str, levels: list[float], zero_code: int) -> Codebook:
    array = np.array(levels, dtype=np.float32)
    array.setflags(write=False)
    return Codebook(name, len(levels).bit_length() - 1, array, zero_code, affine=False)


def _int(bits: int) -> Codebook:
    array = (np.arange(2**bits) - 2 ** (bits - 1)).astype(np.float32)
    array.setflags(write=False)
    return Codebook(f"int{bits}", bits, array, 2 ** (bits - 1), affine=True)


_NF4_NEGATIVE = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
]
_NF4_POSITIVE = [
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]

#: Every codebook by name.
CODEBOOKS: dict[str, Codebook] = {
    book.name: book
    for book in (
        _nf("nf4", [*_NF4_NEGATIVE, 0.0, *_NF4_POSITIVE], zero_code=7),
        _nf(
            "nf3",
            [-1.0, -0.47862920, -0.21714179, 0.0, *_NF4_POSITIVE[1::2]],
            zero_code=3,
        ),
        _nf("nf2", [-1.0, -0.25256848, 0.25256851, 1.0], zero_code=0),
        _int(4),
        _int(3),
        _int(2),
        _int(8),
    )
}
