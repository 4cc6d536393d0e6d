"""ICQ against a slow oracle written from its definition."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from icq_oracle import BOOKS, RELEASED_NF4, awkward_blocks, f32, oracle_block, oracle_entropy

from irq_export.icq import SearchConfig, quantize_tensor
from irq_export.icq_search import SIGMA, search_blocks
from irq_formats.blocks import BlockSpec, encode
from irq_formats.errors import UnsupportedModel, UsageError

QLORA = BlockSpec("nf4", tau="none", scale_rounding="none")


CONFIGS = [
    SearchConfig(tau_steps=6),
    SearchConfig(tau_steps=6, refine="none"),
    SearchConfig(tau_steps=6, tie="first", refine="none"),
    SearchConfig(tau_steps=6, objective="mse", refine="ls"),
    SearchConfig(icq=False, refine="none"),
    SearchConfig(icq=False, refine="ls"),
]


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("codebook", BOOKS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_search_equals_oracle(codebook, size, config):
    blocks = awkward_blocks(size)
    with np.errstate(over="ignore", under="ignore"):
        expected = [oracle_block(w, codebook, config) for w in blocks]
    scale, tau = search_blocks(torch.from_numpy(blocks), codebook, config, with_tau=True, pairs_at_once=100)
    np.testing.assert_array_equal(scale.numpy(), [s for s, _ in expected])
    np.testing.assert_array_equal(tau.numpy(), [t for _, t in expected])


def test_full_grid_equals_oracle():
    blocks = awkward_blocks(64, seed=1)[:8]
    expected = [oracle_block(w, "nf4", SearchConfig()) for w in blocks]
    scale, tau = search_blocks(torch.from_numpy(blocks), "nf4", SearchConfig(), with_tau=True)
    np.testing.assert_array_equal(np.stack([scale, tau], 1), expected)


@pytest.mark.parametrize("codebook", BOOKS)
def test_refit_through_the_origin_without_tau(codebook):
    blocks = awkward_blocks(64)
    config = SearchConfig(icq=False)
    with np.errstate(over="ignore", under="ignore"):
        expected = [oracle_block(w, codebook, config, with_tau=False)[0] for w in blocks]
    scale, tau = search_blocks(torch.from_numpy(blocks), codebook, config, with_tau=False)
    np.testing.assert_array_equal(scale.numpy(), expected)
    assert not tau.any()


@pytest.mark.parametrize("codebook", BOOKS)
def test_stored_codes_are_chosen_against_the_stored_pair(codebook):
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((6, 128)) * 0.05).astype(f32)
    config = SearchConfig(tau_steps=10)
    pairs = np.array([oracle_block(w, codebook, config) for w in weight.reshape(-1, 64)], f32)
    pairs = pairs.reshape(6, 2, 2)
    spec = BlockSpec(codebook)
    expected = encode(weight, pairs[..., 0].copy(), pairs[..., 1].copy(), spec)
    got = quantize_tensor(torch.from_numpy(weight), spec, config).block
    for name, part in expected.parts.items():
        np.testing.assert_array_equal(got.parts[name], part, err_msg=name)


def test_candidate_grid():
    factors = SearchConfig().factors()
    # scipy evaluates ppf of a float32 in float64 and rounds to float32
    assert 1 / float(f32(NormalDist().inv_cdf(float(f32(0.9677083))))) == SIGMA
    assert factors.dtype == np.float32
    assert factors.shape == (201,)
    assert factors[100] == 0
    np.testing.assert_array_equal(factors, -factors[::-1])
    assert factors[200] == f32(0.1 * SIGMA)


# --- what ICQ is for ----------------------------------------------------------------------------------


def per_block_entropy(block):
    codes = block.codes().reshape(-1, block.spec.block_size)
    return np.array([oracle_entropy(c) for c in codes])


@pytest.mark.parametrize("codebook", BOOKS)
def test_search_never_loses_entropy_against_the_median(codebook):
    """The grid holds f = 0; the plain codes (tau = 0) are another grid and are compared in the mean."""
    weight = torch.from_numpy(np.random.default_rng(3).standard_normal((16, 512)).astype(f32))
    spec = BlockSpec(codebook, scale="f32", tau="f32")
    centred = per_block_entropy(quantize_tensor(weight, spec, SearchConfig(refine="none", tau_range=0)).block)
    found = quantize_tensor(weight, spec, SearchConfig(refine="none"))
    assert (per_block_entropy(found.block) >= centred).all()
    assert found.entropy_after > found.entropy_before
    assert found.entropy_after == pytest.approx(per_block_entropy(found.block).mean() / 2**40, abs=1e-12)


@pytest.mark.parametrize("codebook", BOOKS)
def test_refit_never_raises_the_error(codebook):
    weight = torch.from_numpy(np.random.default_rng(4).standard_t(4, (16, 512)).astype(f32))
    spec = BlockSpec(codebook, scale="f32", tau="f32")
    for icq in (True, False):
        plain = quantize_tensor(weight, spec, SearchConfig(icq=icq, refine="none")).rel_mse
        assert quantize_tensor(weight, spec, SearchConfig(icq=icq)).rel_mse < plain


def test_ties_by_error_cost_no_entropy():
    weight = torch.from_numpy(np.random.default_rng(5).standard_normal((16, 512)).astype(f32))
    spec = BlockSpec(scale="f32", tau="f32")
    mse, first = (quantize_tensor(weight, spec, SearchConfig(refine="none", tie=t)) for t in ("mse", "first"))
    assert mse.entropy_after == first.entropy_after
    assert mse.rel_mse < first.rel_mse


@pytest.mark.parametrize("codebook", ["int4", "int3", "int2"])
def test_int_keeps_a_fractional_offset(codebook):
    weight = torch.from_numpy(np.random.default_rng(6).standard_normal((8, 256)).astype(f32))
    block = quantize_tensor(weight, BlockSpec(codebook)).block
    steps = block.tau() / block.scale()
    assert (np.abs(steps - np.round(steps)) > 0.01).mean() > 0.9


def test_entropy_before_is_that_of_the_plain_codes():
    weight = torch.from_numpy(np.random.default_rng(7).standard_normal((8, 256)).astype(f32))
    plain = quantize_tensor(
        weight, BlockSpec("nf4", scale="f32", tau="none"), SearchConfig(icq=False, refine="none")
    )
    assert plain.entropy_before == plain.entropy_after
    assert quantize_tensor(weight, BlockSpec("nf4")).entropy_before == plain.entropy_before


@pytest.mark.parametrize("config", [SearchConfig(), SearchConfig.released()], ids=["exact", "reference"])
def test_result_does_not_depend_on_the_budget(config):
    weight = torch.from_numpy(np.random.default_rng(8).standard_normal((4, 320)).astype(f32))
    small, large = (quantize_tensor(weight, RELEASED_NF4, config, budget=b) for b in (1, 1 << 30))
    for name, part in large.block.parts.items():
        np.testing.assert_array_equal(small.block.parts[name], part, err_msg=name)
    assert (small.entropy_before, small.rel_mse) == (large.entropy_before, large.rel_mse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened(dtype):
    weight = torch.from_numpy(np.random.default_rng(9).standard_normal((4, 128)).astype(f32)).to(dtype)
    half, full = quantize_tensor(weight, BlockSpec()), quantize_tensor(weight.float(), BlockSpec())
    np.testing.assert_array_equal(half.block.dequantize(), full.block.dequantize())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codebook", BOOKS)
@pytest.mark.parametrize("config", [*CONFIGS, SearchConfig.released()], ids=str)
def test_cuda_equals_cpu(codebook, config):
    if config.numerics == "reference" and codebook != "nf4":
        pytest.skip("released numerics are nf4 only")
    gauss = np.random.default_rng(12).standard_normal((2000, 64)).astype(f32)
    awkward = gauss[:1] if config.numerics == "reference" else awkward_blocks(64)
    weight = torch.from_numpy(np.concatenate([gauss, awkward]))
    spec = BlockSpec(codebook, scale="f32", tau="f32") if config.numerics == "exact" else RELEASED_NF4
    cpu, cuda = quantize_tensor(weight, spec, config), quantize_tensor(weight.cuda(), spec, config)
    for name, part in cpu.block.parts.items():
        np.testing.assert_array_equal(cuda.block.parts[name], part, err_msg=name)
    assert (cuda.entropy_before, cuda.entropy_after) == (cpu.entropy_before, cpu.entropy_after)


# --- degenerate blocks --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    value=st.floats(-(2.0**125), 2.0**125, width=32),
    codebook=st.sampled_from(BOOKS),
    icq=st.booleans(),
    refine=st.sampled_from(["ls", "none"]),
)
def test_constant_blocks_decode_exactly(value, codebook, icq, refine):
    weight = np.full((2, 128), value, f32)
    weight[1, 64:] = 0
    config = SearchConfig(icq=icq, refine=refine, tau_steps=3)
    got = quantize_tensor(torch.from_numpy(weight), BlockSpec(codebook), config)
    np.testing.assert_array_equal(got.block.dequantize(), weight)
    assert got.rel_mse == 0
    got.block.validate()


@pytest.mark.parametrize("codebook", BOOKS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_awkward_blocks_stay_finite(codebook, config):
    spec = BlockSpec(codebook, scale="f32", tau="f32")
    for w in awkward_blocks(64):
        got = quantize_tensor(torch.from_numpy(w[None]), spec, config)
        got.block.validate()
        assert np.isfinite(got.block.dequantize()).all()
        assert math.isfinite(got.rel_mse)


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**126])
def test_unquantisable_values_are_named(bad):
    weight = np.zeros((2, 64), f32)
    weight[1, 3] = bad
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.3"):
        quantize_tensor(torch.from_numpy(weight), BlockSpec(), where="model.layers.3")


@pytest.mark.parametrize(
    ("shape", "spec", "config", "error"),
    [
        ((2, 96), BlockSpec(), SearchConfig(), UnsupportedModel),
        ((64,), BlockSpec(), SearchConfig(), UnsupportedModel),
        ((2, 64), BlockSpec(tau="none"), SearchConfig(), UsageError),
        ((2, 64), BlockSpec("int8", 32, "f16", "none"), SearchConfig(icq=False), UsageError),
        ((2, 64), BlockSpec("int4", scale_rounding="none"), SearchConfig.released(), UsageError),
        ((2, 64), BlockSpec("nf4"), SearchConfig.released(), UsageError),
        ((2, 64), RELEASED_NF4, SearchConfig.released(icq=False), UsageError),
        ((2, 64), QLORA, SearchConfig.released(), UsageError),
    ],
)
def test_refusals(shape, spec, config, error):
    with pytest.raises(error):
        quantize_tensor(torch.zeros(shape), spec, config)


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "mae"},
        {"tie": "last"},
        {"refine": "adam"},
        {"numerics": "fast"},
        {"tau_steps": 0},
        {"tau_range": math.nan},
        {"numerics": "reference"},
        {"numerics": "reference", "refine": "none"},
    ],
)
def test_config_refusals(fields):
    with pytest.raises(UsageError):
        SearchConfig(**fields)


def test_integer_weights_are_refused():
    with pytest.raises(UnsupportedModel, match="dtype"):
        quantize_tensor(torch.zeros((2, 64), dtype=torch.int32), BlockSpec())
