"""Double quantisation of block scales and offsets, ``dq8`` (spec/irq-blocks.md, section 4).

One byte per block indexes a signed 8-bit dynamic map (Dettmers et al., arXiv 2110.02861); 256
consecutive blocks share one float32 absolute maximum; scales have one float32 mean per tensor
subtracted first, offsets have none. ``value = fl32(fl32(map[index] * absmax[group]) + mean)``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile

__all__ = ["GROUP_SIZE", "check_zero_groups", "decode_dq8", "dynamic_map", "encode_dq8", "group_count"]

#: Blocks that share one second-level absmax.
GROUP_SIZE = 256

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def group_count(blocks: int) -> int:
    """Return the number of groups; the last one may be short."""
    return -(-blocks // GROUP_SIZE)


@cache
def dynamic_map() -> F32:
    """Return the 256 float32 values of the map, ascending, from -0.99296874 to 1.

    For i = 0..6: the ``2**i`` midpoints of ``linspace(0.1, 1, 2**i + 1)`` times ``10**(i - 6)``, both
    signs; plus 0 and 1. The grid is counted from the nearer end with one rounding, as torch's linspace
    does, so that every value equals bitsandbytes' ``create_dynamic_map()`` bit for bit.
    """
    positive: list[F32] = []
    start, end = np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2**i + 1
        step = np.float64(np.float32((end - start) / np.float32(n - 1)))
        k = np.arange(n, dtype=np.float64)
        grid = np.where(k < n // 2, start + step * k, end - step * (n - 1 - k)).astype(np.float32)
        middles = (grid[:-1] + grid[1:]) / np.float32(2)
        positive.append((np.float32(10.0 ** (i - 6)) * middles).astype(np.float32))
    values = np.concatenate(positive)
    table = np.sort(np.concatenate([values, -values, np.array([0, 1], np.float32)]))
    table.setflags(write=False)
    return table


def decode_dq8(index: U8, absmax: F32, mean: np.float32 | float = 0.0) -> F32:
    """Expand double-quantised block values.

    Args:
        index: uint8 ``(blocks,)`` or any shape, read in C order.
        absmax: float32 ``(ceil(blocks / 256),)``.
        mean: Added to every value, in float32.

    Returns:
        float32, shape of ``index``.
    """
    group = np.repeat(absmax, GROUP_SIZE)[: index.size].reshape(index.shape)
    return (dynamic_map()[index] * group + np.float32(mean)).astype(np.float32)


def check_zero_groups(index: NDArray[np.generic], absmax: NDArray[np.generic], where: str) -> None:
    """Check that groups of absmax 0 hold the index of 0 throughout: one encoding per value.

    Args:
        index: uint8, any shape, read in C order.
        absmax: float32 ``(ceil(blocks / 256),)``.
        where: What to name in the error.

    Raises:
        MalformedFile: One does not.
    """
    zero_index = int(np.searchsorted(dynamic_map(), 0))
    group = np.repeat(absmax == 0, GROUP_SIZE)[: index.size]
    if (index.reshape(-1)[group] != zero_index).any():
        raise MalformedFile(
            "a group whose absmax is 0 has non-zero codes",
            where=where,
            expected=f"index {zero_index} throughout",
        )


def encode_dq8(values: F32, *, with_mean: bool) -> tuple[U8, F32, np.float32]:
    """Quantise block values to one byte each.

    Args:
        values: float32, any shape, finite, read in C order in groups of 256.
        with_mean: Subtract the tensor's mean first (scales); the decoded values are then never
            negative where ``values`` are not: an index that would give one is moved up.

    Returns:
        index uint8 (shape of ``values``), absmax float32 ``(groups,)``, mean.
    """
    mean = np.float32(values.astype(np.float64).mean()) if with_mean and values.size else np.float32(0)
    centred = (values - mean).astype(np.float32).reshape(-1)
    padded = np.zeros(group_count(centred.size) * GROUP_SIZE, np.float32)
    padded[: centred.size] = centred
    absmax: F32 = np.abs(padded.reshape(-1, GROUP_SIZE)).max(axis=1)
    divisor = np.where(absmax > 0, absmax, np.float32(1))
    scaled = padded / np.repeat(divisor, GROUP_SIZE)
    table = dynamic_map()
    bounds = ((table[:-1] + table[1:]) / np.float32(2)).astype(np.float32)
    index = np.searchsorted(bounds, scaled[: centred.size], side="left").astype(np.uint8)
    if with_mean:
        while (negative := decode_dq8(index, absmax, mean) < 0).any():
            index = index + negative.astype(np.uint8)
    return index.reshape(values.shape), absmax, mean
