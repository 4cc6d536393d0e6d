"""The ICQ search on a GPU, bit for bit as :mod:`irq_export.icq_search` defines it.

A block is sorted once (a first kernel). Then one warp owns a block. Its lanes are 32 neighbouring candidates:
each places its thresholds among the sorted weights by bisection, whose last probes hit the first-level cache
and, candidates being close, mostly the same few words. What remains of a round is one integer, the set of the
lanes with most entropy. The errors are computed for the candidates that tie, and the winner is refitted, with
the weights of the block spread over the warp.

Sums by halving are written as sums over an axis of two: one addition, so their order is the definition's
whatever the layout of the tensor.
"""

# mypy: disable-error-code="import-not-found,no-untyped-def,no-untyped-call,untyped-decorator,misc"
# ruff: noqa: N803 - constants of a Triton kernel are written in capitals

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from irq_export.icq_search import SearchConfig, entropy_table
from irq_formats.codebooks import CODEBOOKS

__all__ = ["search"]

_SORTED_BLOCKS = 16  # blocks a program of the sort
_LANES = 32


@triton.jit
def _sort_kernel(ordered, blocks, count, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = block[:, None] < count
    tl.store(ordered + place, tl.sort(tl.load(blocks + place, mask=inside, other=0.0), 1), mask=inside)


@triton.jit
def _halving_sum(x, SIZE: tl.constexpr):
    """Sum of (SIZE,) by halving."""
    if SIZE == 64:
        x = tl.sum(tl.reshape(x, [2, 32]), 0)
    x = tl.sum(tl.reshape(x, [2, 16]), 0)
    x = tl.sum(tl.reshape(x, [2, 8]), 0)
    x = tl.sum(tl.reshape(x, [2, 4]), 0)
    x = tl.sum(tl.reshape(x, [2, 2]), 0)
    return tl.sum(x, 0)


@triton.jit
def _pair(factor, low, high, median, reach, HALF_RANGE: tl.constexpr):
    """Scale and offset of candidates (steps 2 and 3); HALF_RANGE is 0 for nf codebooks."""
    tau = factor * reach + median
    scale = tl.maximum(high - tau, tau - low)
    if HALF_RANGE != 0:
        scale = tl.math.div_rn(scale, tl.full(scale.shape, HALF_RANGE, tl.float32))
        tau = tau + scale * 0.5
    return scale, tau


@triton.jit
def _codes(weight, scale, tau, MIDPOINTS: tl.constexpr, COUNT: tl.constexpr, ZERO: tl.constexpr):
    """Codes i32 of weights (SIZE,) at one pair (step 4)."""
    code = tl.zeros(weight.shape, tl.int32)
    for k in tl.static_range(COUNT):
        code += (weight > scale * MIDPOINTS[k] + tau).to(tl.int32)
    return tl.where(scale == 0, ZERO, code)


@triton.jit
def _search_kernel(
    scale_out,
    tau_out,
    blocks,
    ordered,
    factors,
    levels,
    table,
    CANDIDATES: tl.constexpr,
    MIDPOINTS: tl.constexpr,
    COUNT: tl.constexpr,
    ZERO: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    SIZE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BY_ENTROPY: tl.constexpr,
    TIE_FIRST: tl.constexpr,
    REFIT: tl.constexpr,
    WITH_TAU: tl.constexpr,
):
    """One block: scale_out, tau_out f32 (blocks,); blocks and ordered f32 (blocks, SIZE)."""
    block = tl.program_id(0).to(tl.int64)
    row = ordered + block * SIZE
    low, high, median = tl.load(row), tl.load(row + SIZE - 1), tl.load(row + SIZE // 2 - 1)
    quarter, three_quarters = tl.load(row + SIZE // 4 - 1), tl.load(row + 3 * SIZE // 4 - 1)
    reach = tl.maximum(high - median, median - low)
    lane = tl.arange(0, 32)
    rounds = tl.arange(0, ROUNDS)  # padded to a power of two
    sets = tl.where(rounds == 0, 1, 0)  # i32: bit j of sets[r] is candidate 32 r + j
    if reach > 0:  # otherwise constant: the candidates are all the same
        most = tl.full([], -1, tl.int64)
        for r in range((CANDIDATES + 31) // 32):
            i = r * 32 + lane
            inside = i < CANDIDATES
            entropy = tl.zeros([32], tl.int64)
            if BY_ENTROPY:
                factor = tl.load(factors + i, mask=inside, other=0.0)
                scale, tau = _pair(factor, low, high, median, reach, HALF_RANGE)
                before = tl.zeros([32], tl.int32)
                for k in tl.static_range(COUNT):
                    threshold = scale * MIDPOINTS[k] + tau
                    upper = median <= threshold
                    middle = tl.where(upper, three_quarters, quarter)
                    below = tl.where(upper, SIZE // 2, 0) + tl.where(middle <= threshold, SIZE // 4, 0)
                    if SIZE == 64:
                        below += tl.where(tl.load(row + below + 7) <= threshold, 8, 0)
                    below += tl.where(tl.load(row + below + 3) <= threshold, 4, 0)
                    below += tl.where(tl.load(row + below + 1) <= threshold, 2, 0)
                    below += tl.where(tl.load(row + below) <= threshold, 1, 0)
                    below = tl.where(high <= threshold, SIZE, below)
                    entropy += tl.load(table + below - before)
                    before = below
                entropy += tl.load(table + SIZE - before)
                entropy = tl.where(scale == 0, 0, entropy)
            entropy = tl.where(inside, entropy, -2)
            here = tl.max(entropy, 0)
            chosen = tl.sum(tl.where(entropy == here, 1 << lane, 0), 0)
            sets = tl.where(here > most, 0, sets)
            sets = tl.where((rounds == r) & (here >= most), chosen, sets)
            most = tl.maximum(most, here)

    weight = tl.load(blocks + block * SIZE + tl.arange(0, SIZE))
    best_scale, best_tau = 0.0, 0.0
    least = float("inf")
    found = 0
    for r in range((CANDIDATES + 31) // 32):
        left = tl.sum(tl.where(rounds == r, sets, 0), 0)
        if TIE_FIRST and BY_ENTROPY:
            left = tl.where(found != 0, 0, left & -left)
        while left != 0:
            bit = left & -left
            left = left ^ bit
            i = r * 32 + tl.sum(tl.where((1 << lane) == bit, lane, 0), 0)
            scale, tau = _pair(tl.load(factors + i), low, high, median, reach, HALF_RANGE)
            if TIE_FIRST and BY_ENTROPY:
                error = 0.0
            else:
                code = _codes(weight, scale, tau, MIDPOINTS, COUNT, ZERO)
                error = weight - (tl.load(levels + code) * scale + tau)
                error = _halving_sum(error * error, SIZE)
            better = (found == 0) | (error < least)
            best_scale = tl.where(better, scale, best_scale)
            best_tau = tl.where(better, tau, best_tau)
            least = tl.where(better, error, least)
            found = 1

    if REFIT:
        code = _codes(weight, best_scale, best_tau, MIDPOINTS, COUNT, ZERO)
        c = tl.load(levels + code).to(tl.float64)
        w = weight.to(tl.float64)
        mean_c, mean_w = tl.full([], 0, tl.float64), tl.full([], 0, tl.float64)
        if WITH_TAU:
            mean_c = _halving_sum(c, SIZE) / SIZE
            mean_w = _halving_sum(w, SIZE) / SIZE
            c -= mean_c
            w -= mean_w
        variance = _halving_sum(c * c, SIZE)
        slope = _halving_sum(c * w, SIZE) / variance
        offset = (mean_w - slope * mean_c).to(tl.float32)
        better = (variance > 0) & (slope.to(tl.float32) > 0)
        best_scale = tl.where(better, slope.to(tl.float32), best_scale)
        best_tau = tl.where(better, offset, best_tau)
    tl.store(scale_out + block, best_scale)
    tl.store(tau_out + block, best_tau)


class _Tables(NamedTuple):
    """Levels f32 (2**k,) and entropy of counts i64 (B + 1,) on a device."""

    levels: Tensor
    entropy: Tensor


@cache
def _tables(codebook: str, block_size: int, device: torch.device) -> _Tables:
    levels = torch.tensor(CODEBOOKS[codebook].levels, device=device)
    return _Tables(levels, torch.tensor(entropy_table(block_size), device=device))


def search(blocks: Tensor, codebook: str, config: SearchConfig, *, with_tau: bool) -> tuple[Tensor, Tensor]:
    """Find scale and offset of every block, as :func:`irq_export.icq_search.search_blocks` does with ICQ.

    Args:
        blocks: float32 ``(n, B)`` on CUDA.
        codebook: Name of the codebook.
        config: What to search for; ``icq`` is taken as true.
        with_tau: Whether the file will hold an offset.

    Returns:
        scale and tau, float32 ``(n,)``.
    """
    blocks = blocks.contiguous()
    count, size = blocks.shape
    book = CODEBOOKS[codebook]
    tables = _tables(codebook, size, blocks.device)
    factors = torch.from_numpy(config.factors()).to(blocks.device)
    ordered = torch.empty_like(blocks)
    scale, tau = blocks.new_empty(count), blocks.new_empty(count)
    if not count:
        return scale, tau
    with torch.cuda.device_of(blocks):
        _sort_kernel[(triton.cdiv(count, _SORTED_BLOCKS),)](
            ordered, blocks, count, SIZE=size, BLOCKS=_SORTED_BLOCKS, num_warps=4
        )
        _search_kernel[(count,)](
            scale,
            tau,
            blocks,
            ordered,
            factors,
            tables.levels,
            tables.entropy,
            CANDIDATES=len(factors),
            MIDPOINTS=tuple(book.midpoints.tolist()),
            COUNT=len(book.midpoints),
            ZERO=book.zero_code,
            HALF_RANGE=(2**book.bits - 1) / 2 if book.affine else 0.0,
            SIZE=size,
            ROUNDS=triton.next_power_of_2(triton.cdiv(len(factors), _LANES)),
            BY_ENTROPY=config.objective == "entropy",
            TIE_FIRST=config.tie == "first",
            REFIT=config.refine == "ls",
            WITH_TAU=with_tau,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return scale, tau
