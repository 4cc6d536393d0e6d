"""ICQ against a slow oracle written from its definition, and against bitsandbytes."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import SUM_ORDER_FLOAT64

from irq_export.icq import SearchConfig, _finish_in_numpy, _finish_in_torch, quantize_tensor
from irq_export.icq_search import SIGMA, search_blocks
from irq_formats.blocks import BlockSpec, encode
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import dynamic_map
from irq_formats.errors import UnsupportedModel, UsageError

BOOKS = ["nf4", "nf3", "nf2", "int4", "int3", "int2"]
RELEASED_NF4 = BlockSpec("nf4", scale_rounding="none")
QLORA = BlockSpec("nf4", tau="none", scale_rounding="none")
f32 = np.float32


# --- the oracle: one block, one candidate at a time ---------------------------------------------------


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


# --- bitsandbytes and the released code ---------------------------------------------------------------


def bitsandbytes_nf4(weight, block_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    high_first = packed.reshape(-1)
    codes = torch.stack([high_first >> 4, high_first & 15], dim=1).reshape(weight.shape)
    return codes.numpy(), state, functional.dequantize_4bit(packed, state).numpy()


def weights_for_bitsandbytes():
    rng = np.random.default_rng(10)
    spiky = np.zeros((192, 576))
    spiky[::7, ::64] = rng.standard_normal((28, 9))
    sparse = rng.standard_normal((64, 1024))
    sparse[:40] = 0  # whole second-level groups of zeros
    return {
        "gaussian": rng.standard_normal((192, 576)) * 0.02,  # 1728 blocks: a short last group
        "heavy": rng.standard_t(2, (96, 576)),
        "spiky": spiky,
        "sparse": sparse,
        "zero": np.zeros((8, 64)),
        "constant": np.full((8, 128), -0.3),
        "gridded": rng.integers(-8, 8, (64, 256)) / 7,
        "tiny": rng.standard_normal((8, 128)) * 1e-38,
    }


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("name", weights_for_bitsandbytes())
def test_qlora_equals_bitsandbytes(name, block_size):
    weight = torch.from_numpy(weights_for_bitsandbytes()[name].astype(f32))
    codes, state, dequantized = bitsandbytes_nf4(weight, block_size)
    spec = BlockSpec("nf4", block_size, tau="none", scale_rounding="none")
    block = quantize_tensor(weight, spec, SearchConfig.released(icq=False)).block
    np.testing.assert_array_equal(block.codes(), codes)
    np.testing.assert_array_equal(block.parts["scale"].reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(block.parts["scale_absmax"], state.state2.absmax.numpy())
    np.testing.assert_array_equal(block.parts["scale_offset"], [state.offset.item()])
    np.testing.assert_array_equal(block.dequantize(), dequantized)


def released_oracle(weight):
    """tau, codes of the released search (facts ir-qlora, 1.1 and 1.2), every candidate in full with torch."""
    blocks = torch.from_numpy(weight).reshape(-1, 64)
    midpoints = torch.from_numpy(CODEBOOKS["nf4"].midpoints)

    def codes_of(tau):
        half = (blocks - tau).half().float()
        absmax = half.abs().max(1, keepdim=True)[0]
        return torch.bucketize((half * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1), midpoints), absmax

    tau0 = blocks.median(1, keepdim=True)[0]
    reach = (blocks - tau0).abs().max(1, keepdim=True)[0]
    best, chosen = None, None
    for f in np.linspace(-0.1 * SIGMA, 0.1 * SIGMA, 201):
        tau = f * reach + tau0
        share = (codes_of(tau)[0][None] == torch.arange(16)[:, None, None]).sum(-1, keepdim=True) / 64
        entropy = -share * torch.log2(share)
        entropy = torch.where(torch.isnan(entropy), 0, entropy).sum(0)
        if best is None:
            best, chosen = entropy, tau
        else:
            chosen = torch.where(entropy > best, tau, chosen)
            best = torch.max(best, entropy)
    return chosen[:, 0], *codes_of(chosen)


@pytest.mark.parametrize("kind", ["gaussian", "degenerate"])
def test_released_search(kind):
    rng = np.random.default_rng(11)
    # 576 blocks: a short last group of tau, but a multiple of 32, where torch's sum over codes is in order
    weight = (rng.standard_normal((64, 576)) * 0.03).astype(f32)
    if kind == "degenerate":
        weight[:30] = 0  # a whole group without an offset
        weight[31, :64] = 0.25
    tau, codes, scale = released_oracle(weight)
    block = quantize_tensor(torch.from_numpy(weight), RELEASED_NF4, SearchConfig.released()).block
    np.testing.assert_array_equal(block.codes(), codes.reshape(weight.shape))
    padded = torch.nn.functional.pad(tau, (0, -len(tau) % 256)).reshape(-1, 256)
    absmax = padded.abs().max(1)[0]
    distance = ((padded / absmax[:, None])[..., None] - torch.from_numpy(dynamic_map().copy())).abs()
    index = distance.argmin(-1).reshape(-1)[: len(tau)]
    np.testing.assert_array_equal(block.parts["tau_absmax"], absmax)
    np.testing.assert_array_equal(block.parts["tau"].reshape(-1), index)
    # the scale's nested state is bitsandbytes' own, given the residual the released code quantises
    residual = (torch.from_numpy(weight).reshape(-1, 64) - tau[:, None]).half().reshape(weight.shape)
    bnb_codes, state, _ = bitsandbytes_nf4(residual, 64)
    np.testing.assert_array_equal(block.codes(), bnb_codes)
    np.testing.assert_array_equal(block.parts["scale"].reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(block.parts["scale_offset"], [state.offset.item()])
    assert np.isfinite(block.dequantize()).all()
    assert float(scale.max()) > 0


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


def test_released_search_refuses_what_fp16_cannot_hold():
    weight = torch.zeros((1, 64))
    weight[0, 0] = 1e5
    with pytest.raises(UnsupportedModel, match="fp16"):
        quantize_tensor(weight, RELEASED_NF4, SearchConfig.released())


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("codebook", BOOKS)
def test_codes_chosen_in_torch_are_those_of_the_codec(codebook, size):
    """What a GPU does after the search, here on a CPU."""
    spec = BlockSpec(codebook, size)
    weight = awkward_blocks(size)
    rng = np.random.default_rng(0)
    scale = np.abs(weight).max(axis=1, keepdims=True) * f32(0.9)
    tau = (rng.standard_normal(scale.shape) * 0.01).astype(f32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = _finish_in_numpy(torch.from_numpy(weight), scale, tau, None, spec)
    for packed in (None, expected[0]):
        found = _finish_in_torch(torch.from_numpy(weight), scale, tau, packed, spec)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1] == expected[1]
        assert found[2:] == pytest.approx(expected[2:], rel=SUM_ORDER_FLOAT64)
