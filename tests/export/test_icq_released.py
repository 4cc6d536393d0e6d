"""The released numerics against bitsandbytes and against the released search, written out with torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from icq_oracle import RELEASED_NF4, f32

from irq_export.icq import SearchConfig, quantize_tensor
from irq_export.icq_search import SIGMA
from irq_formats.blocks import BlockSpec
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import dynamic_map
from irq_formats.errors import UnsupportedModel


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


def test_released_search_refuses_what_fp16_cannot_hold():
    weight = torch.zeros((1, 64))
    weight[0, 0] = 1e5
    with pytest.raises(UnsupportedModel, match="fp16"):
        quantize_tensor(weight, RELEASED_NF4, SearchConfig.released())
