"""ICQ from its definition, one block and one candidate at a time; and blocks that are hard on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from irq_export.icq_search import SIGMA
from irq_formats.blocks import BlockSpec
from irq_formats.codebooks import CODEBOOKS

BOOKS = ["nf4", "nf3", "nf2", "int4", "int3", "int2"]
RELEASED_NF4 = BlockSpec("nf4", scale_rounding="none")
f32 = np.float32


def tree_sum(x):
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def oracle_codes(w, scale, tau, book):
    if scale == 0:
        return np.full(len(w), book.zero_code)
    return np.array([sum(x > f32(f32(scale * m) + tau) for m in book.midpoints) for x in w])


def oracle_entropy(codes):
    share = [np.count_nonzero(codes == k) / len(codes) for k in set(codes.tolist())]
    return sum(round(-p * math.log2(p) * 2**40) for p in share)


def oracle_pair(s, t, book, half_step=True):
    if not book.affine:
        return s, t
    d = f32(s / f32((2**book.bits - 1) / 2))
    return d, f32(t + f32(d / f32(2))) if half_step else t


def oracle_block(w, codebook, config, with_tau=True):
    """Scale and tau of one float32 block."""
    book = CODEBOOKS[codebook]
    if config.icq:
        tau0 = np.sort(w)[len(w) // 2 - 1]
        reach = np.abs(w - tau0).max()
        best = None
        n = config.tau_steps
        for i in range(2 * n + 1):
            f = f32((i - n) / n * config.tau_range * SIGMA)
            t = f32(f32(f * reach) + tau0)
            scale, tau = oracle_pair(np.abs(w - t).max(), t, book)
            codes = oracle_codes(w, scale, tau, book)
            residual = w - (book.levels[codes] * scale + tau)
            error = tree_sum(residual * residual)
            entropy = oracle_entropy(codes)
            key = {
                ("entropy", "mse"): (-entropy, error),
                ("entropy", "first"): (-entropy,),
            }.get((config.objective, config.tie), (error,))
            if best is None or key < best[0]:
                best = (key, scale, tau)
        _, scale, tau = best
    elif with_tau and (w == w[0]).all():
        scale, tau = f32(0), w[0]
    else:
        scale, tau = oracle_pair(np.abs(w).max(), f32(0), book, half_step=False)
    if config.refine == "none":
        return scale, tau
    c = book.levels[oracle_codes(w, scale, tau, book)].astype(np.float64)
    x = w.astype(np.float64)
    mc, mx = (tree_sum(c) / len(w), tree_sum(x) / len(w)) if with_tau else (0.0, 0.0)
    variance = tree_sum((c - mc) * (c - mc))
    slope = tree_sum((c - mc) * (x - mx)) / variance if variance > 0 else 0.0
    return (f32(slope), f32(mx - slope * mc)) if f32(slope) > 0 else (scale, tau)


def awkward_blocks(size, seed=0):
    """Gaussian, heavy-tailed and gridded blocks, and the degenerate ones, float32 (n, size)."""
    rng = np.random.default_rng(seed)
    gauss = rng.standard_normal((6, size)) * 0.02
    heavy = rng.standard_t(2, (3, size))
    grid = rng.integers(-8, 8, (3, size)) * 0.125  # many equal weights, exact ties of thresholds
    outlier = np.zeros((1, size))
    outlier[0, 5] = 3.0
    two = np.where(np.arange(size) < size // 2, -1.0, 1.0)[None]
    shifted = rng.standard_normal((1, size)) * 1e-3 + 5.0
    denormal = rng.integers(-9, 9, (2, size)) * 2.0**-149
    tiny = rng.standard_normal((1, size)) * 1e-30
    huge = rng.standard_normal((1, size)) * 1e36
    flat = np.stack([np.zeros(size), np.full(size, 0.3), np.full(size, -7e-42), np.full(size, 4e37)])
    return np.concatenate([gauss, heavy, grid, outlier, two, shifted, denormal, tiny, huge, flat]).astype(f32)


@contextmanager
def in_torch() -> Iterator[None]:
    """A CPU computes in torch, as the definition is written, not in the native module."""
    with (
        mock.patch("irq_export.icq_search.runs_natively", return_value=False),
        mock.patch("irq_export.icq.runs_natively", return_value=False),
    ):
        yield
