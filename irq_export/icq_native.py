"""Search, refit and codes on a CPU: the C++ of the native module, over as many threads as torch uses.

Bit for bit what :mod:`irq_export.icq_search` defines, on every instruction set (runtime/src/icq). The sums of
a measure are float64, in an order of their own that does not depend on the threads.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irq_export.icq_search import SearchConfig, entropy_table
from irq_formats.codebooks import CODEBOOKS
from irq_runtime import _native

__all__ = ["Encoded", "encode", "plain_entropy", "search"]

F32 = NDArray[np.float32]


class Encoded(NamedTuple):
    """Packed codes uint8 ``(n, bytes of a block)``; summed: entropy, fixed point, squared error and norm."""

    packed: NDArray[np.uint8]
    entropy: int
    error: float
    norm: float


@cache
def _book(codebook: str, block_size: int) -> _native.IcqBook:
    book = CODEBOOKS[codebook]
    half_range = (2**book.bits - 1) / 2 if book.affine else 0.0
    table = np.array(entropy_table(block_size), np.int64)
    return _native.IcqBook(book.levels, book.midpoints, book.zero_code, half_range, table)


def search(blocks: Tensor, codebook: str, config: SearchConfig, *, with_tau: bool) -> tuple[Tensor, Tensor]:
    """Find scale and offset of every block, as :func:`irq_export.icq_search.search_blocks` does."""
    scale, tau = _book(codebook, blocks.shape[1]).search(
        blocks.contiguous().numpy(),
        config.factors() if config.icq else np.empty(0, np.float32),
        config.objective == "entropy",
        config.tie == "first",
        config.refine == "ls",
        with_tau,
        torch.get_num_threads(),
    )
    return torch.from_numpy(scale), torch.from_numpy(tau)


def plain_entropy(blocks: Tensor, codebook: str) -> int:
    """Sum over blocks f32 (n, B) of the entropy of their plain codes, fixed point."""
    book = _book(codebook, blocks.shape[1])
    return book.plain_entropy(blocks.contiguous().numpy(), torch.get_num_threads())


def encode(blocks: Tensor, scale: F32, tau: F32, codebook: str) -> Encoded:
    """Choose, pack and measure the codes of blocks f32 (n, B) at pairs f32 (n,), as the codec does.

    At most 2**20 blocks: the entropy is summed in 64 bits.
    """
    book = _book(codebook, blocks.shape[1])
    return Encoded(*book.encode(blocks.contiguous().numpy(), scale, tau, torch.get_num_threads()))
