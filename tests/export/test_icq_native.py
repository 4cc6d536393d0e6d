"""The C++ search equals the torch search bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from irq_export.icq_search import SearchConfig, _book, _search, _search_native
from irq_runtime import _native

CODEBOOKS = ["nf4", "nf3", "nf2", "int4", "int3", "int2"]
SEARCHES = [
    SearchConfig(),
    SearchConfig(tie="first"),
    SearchConfig(objective="mse", tau_steps=20),
    SearchConfig(tau_range=0.5, tau_steps=7),
]


def awkward_blocks(block_size: int) -> torch.Tensor:
    """Gaussian, heavy-tailed, constant, zero, rounded, huge, denormal and one-sided blocks, f32 (n, B)."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randn(400, block_size, generator=generator) * 0.02
    blocks[:100] /= torch.rand(100, block_size, generator=generator) + 1e-3
    blocks[100:110] = 0
    blocks[110:120] = 0.37
    blocks[120:180] = (blocks[120:180] * 100).round() / 100
    blocks[180:190, 5] = 1e30
    blocks[190:200] *= 1e-37
    blocks[200:220] = -blocks[200:220].abs()
    return blocks


@pytest.mark.parametrize("search", SEARCHES, ids=["default", "first", "mse", "wide"])
@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_native_equals_torch(codebook: str, block_size: int, search: SearchConfig) -> None:
    blocks = awkward_blocks(block_size)
    book = _book(codebook, block_size, blocks.device)
    expected = _search(blocks, search, book, pairs_at_once=4096)
    found = _search_native(blocks, search, book)
    for name, a, b in zip(("scale", "tau"), expected, found, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_threads_share_any_number_of_blocks(threads: int, count: int) -> None:
    blocks, book = awkward_blocks(64)[:count], _book("nf4", 64, torch.device("cpu"))
    expected = _search(blocks, SearchConfig(), book, 4096) if count else (torch.empty(0), torch.empty(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scale, tau = _search_native(blocks, SearchConfig(), book)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(scale, expected[0])
    assert torch.equal(tau, expected[1])


def test_shapes_are_checked() -> None:
    book = _book("nf4", 64, torch.device("cpu"))
    arguments = [
        np.zeros((2, 64), np.float32),
        book.levels.numpy(),
        book.midpoints.numpy(),
        7,
        0.0,
        book.table.numpy(),
        SearchConfig().factors(),
    ]
    assert _native.icq_search(*arguments, True, True, 1).shape == (2, 2)
    for i, bad in (
        (0, np.zeros((2, 48), np.float32)),
        (2, book.midpoints.numpy()[:3]),
        (3, 16),
        (5, book.table.numpy()[:5]),
        (6, np.zeros(0, np.float32)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            _native.icq_search(*arguments[:i], bad, *arguments[i + 1 :], True, True, 1)
