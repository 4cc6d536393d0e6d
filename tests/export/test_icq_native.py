"""The C++ search, refit and codes equal torch and the codec bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from icq_oracle import BOOKS, awkward_blocks, f32, in_torch
from tolerance import SUM_ORDER_FLOAT64

from irq_export import icq_native
from irq_export.icq import _finish_in_torch, quantize_tensor
from irq_export.icq_search import SearchConfig, block_entropy, entropy_table, plain_entropy, search_blocks
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.codebooks import CODEBOOKS
from irq_runtime import _native

SEARCHES = {
    "default": SearchConfig(),
    "paper": SearchConfig(tie="first", refine="none"),
    "mse": SearchConfig(objective="mse", tau_steps=20, refine="none"),
    "wide": SearchConfig(tau_range=0.5, tau_steps=7),
    "one": SearchConfig(tau_steps=1, refine="none"),
    "many": SearchConfig(tau_steps=300, tau_range=1.5, refine="none"),
    "plain": SearchConfig(icq=False, refine="none"),
    "plain, refit": SearchConfig(icq=False),
}


def every_isa() -> Iterator[str]:
    """Force every instruction set of this machine in turn."""
    before = _native.isa()
    try:
        for isa in ("scalar", "avx2", "avx512", "neon"):
            if _native.set_isa(isa):
                yield isa
    finally:
        _native.set_isa(before)


def hard_blocks(size: int) -> torch.Tensor:
    """f32 (n, B): ordinary blocks, awkward ones, and such that thresholds fall or coincide by rounding."""
    rng = np.random.default_rng(3)
    ordinary = rng.standard_normal((150, size)) * 0.02
    heavy = ordinary[:50] / (rng.random((50, size)) + 1e-3)
    rounded = np.round(ordinary[50:80], 2)
    one_sided = -np.abs(ordinary[80:100])
    offset = 1000 + rng.integers(-9, 9, (40, size)) * 2.0**-14  # a few units in the last place
    denormal = rng.integers(-3, 3, (40, size)) * 2.0**-149
    parts = [ordinary, heavy, rounded, one_sided, offset, denormal, awkward_blocks(size)]
    return torch.from_numpy(np.concatenate(parts).astype(f32))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("codebook", BOOKS)
def test_search_equals_torch(codebook: str, block_size: int, search: SearchConfig) -> None:
    blocks = hard_blocks(block_size)
    for with_tau in (True, False) if search.refine == "ls" else (True,):
        with in_torch():
            expected = search_blocks(blocks, codebook, search, with_tau=with_tau, pairs_at_once=4096)
        for isa in every_isa():
            found = icq_native.search(blocks, codebook, search, with_tau=with_tau)
            for name, a, b in zip(("scale", "tau"), expected, found, strict=True):
                np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=f"{name} on {isa}")


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("codebook", BOOKS)
def test_codes_and_measures_are_those_of_the_codec(codebook: str, block_size: int) -> None:
    blocks, spec = hard_blocks(block_size), BlockSpec(codebook, block_size)
    scale, tau = icq_native.search(blocks, codebook, SearchConfig(tau_steps=9), with_tau=True)
    scale[:3] = 0
    pairs = scale[:, None].numpy(), tau[:, None].numpy()
    codes = spec.codec.encode(blocks.numpy(), *pairs)
    exact = blocks.double().numpy()
    error = np.square(exact - spec.codec.decode(codes, *pairs)).sum()
    with in_torch():
        entropy = plain_entropy(blocks, codebook)
    for isa in every_isa():
        found = icq_native.encode(blocks, scale.numpy(), tau.numpy(), codebook)
        np.testing.assert_array_equal(found.packed, spec.codec.pack(codes), err_msg=isa)
        assert found.entropy == block_entropy(torch.from_numpy(codes), codebook)
        assert found.error == pytest.approx(error, rel=SUM_ORDER_FLOAT64)
        assert found.norm == pytest.approx(np.square(exact).sum(), rel=SUM_ORDER_FLOAT64)
        assert icq_native.plain_entropy(blocks, codebook) == entropy


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("codebook", BOOKS)
def test_codes_chosen_in_torch_are_the_same(codebook: str, block_size: int) -> None:
    """What a GPU does after the search, here on a CPU; and measuring codes that are given."""
    blocks, spec = hard_blocks(block_size), BlockSpec(codebook, block_size)
    scale, tau = icq_native.search(blocks, codebook, SearchConfig(icq=False), with_tau=True)
    expected = icq_native.encode(blocks, scale.numpy(), tau.numpy(), codebook)
    for given in (None, expected.packed):
        found = _finish_in_torch(blocks, scale[:, None].numpy(), tau[:, None].numpy(), given, spec)
        np.testing.assert_array_equal(found.packed, expected.packed)
        assert found.entropy == expected.entropy
        assert found[2:] == pytest.approx(expected[2:], rel=SUM_ORDER_FLOAT64)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 17, 1023, 1025, 3000])
def test_threads_share_any_number_of_blocks(threads: int, count: int) -> None:
    blocks = hard_blocks(64).repeat(10, 1)[:count]
    search = SearchConfig(tau_steps=5)
    results = []
    before = torch.get_num_threads()
    try:
        for each in (1, threads):
            torch.set_num_threads(each)
            pair = icq_native.search(blocks, "nf4", search, with_tau=True)
            encoded = icq_native.encode(blocks, pair[0].numpy(), pair[1].numpy(), "nf4")
            results.append((pair, encoded, icq_native.plain_entropy(blocks, "nf4")))
    finally:
        torch.set_num_threads(before)
    (alone, encoded, entropy), (shared, encoded_shared, entropy_shared) = results
    assert all(map(torch.equal, alone, shared))
    np.testing.assert_array_equal(encoded.packed, encoded_shared.packed)
    assert encoded[1:] == encoded_shared[1:]
    assert entropy == entropy_shared


@pytest.mark.parametrize("search", [SearchConfig(), SearchConfig(icq=False)], ids=["icq", "plain"])
def test_a_matrix_is_quantised_as_in_torch(search: SearchConfig) -> None:
    weight = hard_blocks(64)[:240].clamp(-1e3, 1e3).reshape(60, 256)
    here = quantize_tensor(weight, BlockSpec(), search)
    with in_torch():
        there = quantize_tensor(weight, BlockSpec(), search)
    assert isinstance(here.block, BlockTensor)
    for name, part in there.block.parts.items():
        np.testing.assert_array_equal(here.block.parts[name], part, err_msg=name)
    assert (here.entropy_before, here.entropy_after) == (there.entropy_before, there.entropy_after)
    assert here.rel_mse == pytest.approx(there.rel_mse, rel=SUM_ORDER_FLOAT64)


def test_a_grid_too_large_for_the_module_is_searched_in_torch() -> None:
    search = SearchConfig(tau_steps=2048)
    with pytest.raises(ValueError, match="too many candidates"):
        icq_native.search(hard_blocks(64)[:2], "nf2", search, with_tau=True)
    scale, tau = search_blocks(hard_blocks(64)[:2], "nf2", search, with_tau=True)
    assert scale.isfinite().all()
    assert tau.isfinite().all()


def test_the_largest_grid_of_the_module() -> None:
    search = SearchConfig(tau_steps=2047, tau_range=2.0)
    blocks = hard_blocks(64)[::40].contiguous()
    with in_torch():
        expected = search_blocks(blocks, "nf4", search, with_tau=True)
    found = icq_native.search(blocks, "nf4", search, with_tau=True)
    assert all(map(torch.equal, expected, found))


def test_shapes_are_checked() -> None:
    book = CODEBOOKS["nf4"]
    arguments = [book.levels, book.midpoints, book.zero_code, 0.0, np.array(entropy_table(64), np.int64)]
    for i, bad in ((0, book.levels[:3]), (1, book.midpoints[:3]), (2, 16), (4, arguments[4][:5])):
        with pytest.raises(ValueError, match="do not fit"):
            _native.IcqBook(*arguments[:i], bad, *arguments[i + 1 :])
    made = _native.IcqBook(*arguments)
    blocks, pairs = np.zeros((2, 64), f32), np.zeros(2, f32)
    assert made.encode(blocks, pairs, pairs, 1)[0].shape == (2, 32)
    with pytest.raises(ValueError, match="another size"):
        made.encode(blocks[:, :32].copy(), pairs, pairs, 1)
    with pytest.raises(ValueError, match="another size"):
        made.search(blocks[:, :32].copy(), pairs, True, True, True, True, 1)
    with pytest.raises(ValueError, match="per block"):
        made.encode(blocks, pairs[:1], pairs, 1)
