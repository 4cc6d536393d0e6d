"""Calibrated quantisation: the format is that of ICQ, the error it makes small is that of the output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from irq_export.icq import SearchConfig, quantize_tensor
from irq_export.icq_calibrated import feedback_codes, nearest_codes, quantize_calibrated, weighted_pairs
from irq_formats.blocks import BlockSpec
from irq_formats.errors import UsageError

BOOKS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")


def layer(n_out: int = 24, n_in: int = 192, tokens: int = 800) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, a few channels far larger than the others, as in a language model."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn((n_in, n_in), generator=generator) * 0.1 + torch.eye(n_in)
    x = torch.randn((tokens, n_in), generator=generator) @ mix
    x[:, ::37] *= 15
    return torch.randn((n_out, n_in), generator=generator) * 0.05, x


def output_error(weight: Tensor, x: Tensor, decoded: np.ndarray) -> float:
    return float((x @ (weight - torch.from_numpy(decoded)).mT).square().sum())


@pytest.mark.parametrize("codebook", BOOKS)
def test_each_step_lowers_the_error_of_the_output(codebook: str) -> None:
    """Plain + refit, then calibrated pairs, then feedback: each clearly below the one before."""
    weight, x = layer()
    spec = BlockSpec(codebook)
    moments = x.mT @ x
    refit = quantize_tensor(weight, spec, SearchConfig(icq=False)).block
    pairs = quantize_calibrated(weight, spec, moments.diagonal())
    feedback = quantize_calibrated(weight, spec, moments)
    errors = [output_error(weight, x, b.dequantize()) for b in (refit, pairs.block, feedback.block)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    for done in (pairs, feedback):
        done.block.validate()
        assert done.block.spec == spec
        assert done.block.bits_per_weight == refit.bits_per_weight
        assert done.entropy_after <= spec.bits
        decoded = torch.from_numpy(done.block.dequantize())
        expected = float((weight - decoded).double().square().sum() / weight.double().square().sum())
        assert done.rel_mse == pytest.approx(expected, rel=1e-6)


def test_uncorrelated_inputs_need_no_feedback() -> None:
    """With a diagonal H there is nothing to feed forward: the codes are the nearest."""
    weight, _ = layer()
    scale, tau = weighted_pairs(weight.view(24, 3, 64), torch.ones(3, 64), "nf4")
    codes = feedback_codes(weight, scale, tau, torch.eye(192), "nf4")
    nearest = nearest_codes(weight.view(24, 3, 64), scale, tau, "nf4").view(24, 192)
    np.testing.assert_array_equal(codes, nearest)


def test_layers_may_be_worked_together() -> None:
    """Leading dimensions are a batch: each matrix gets the codes it gets alone."""
    weight, x = layer()
    other, moments = weight.flip(0), torch.stack([x.mT @ x, x[:300].mT @ x[:300]])
    pairs = [weighted_pairs(w.view(24, 3, 64), torch.ones(3, 64), "nf3") for w in (weight, other)]
    scale, tau = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    together = feedback_codes(torch.stack([weight, other]), scale, tau, moments, "nf3")
    for i, matrix in enumerate((weight, other)):
        alone = feedback_codes(matrix, scale[i], tau[i], moments[i], "nf3")
        assert (together[i] != alone).float().mean() < 0.01  # the order of sums may differ


@pytest.mark.parametrize("codebook", ["nf4", "nf2", "int4"])
def test_constant_blocks_and_unseen_inputs(codebook: str) -> None:
    """A constant block decodes exactly; inputs that never occur, and a text without any, cost nothing."""
    weight, x = layer()
    weight[0, :64], weight[1, 64:128], x[:, 100:] = 0.0, 0.375, 0.0
    for moments in (x.mT @ x, (x.mT @ x).diagonal(), torch.zeros(192, 192), torch.zeros(192)):
        decoded = quantize_calibrated(weight, BlockSpec(codebook), moments).block.dequantize()
        assert np.isfinite(decoded).all()
        assert (decoded[0, :64] == 0).all()
        if moments.ndim == 1:
            assert (decoded[1, 64:128] == np.float32(0.375)).all()


def test_refusals() -> None:
    weight, x = layer()
    with pytest.raises(UsageError, match="scale and an offset"):
        quantize_calibrated(weight, BlockSpec("nf4", tau="none"), x.mT @ x)
    with pytest.raises(UsageError, match="another layer"):
        quantize_calibrated(weight, BlockSpec("nf4"), torch.ones(64))
    with pytest.raises(UsageError, match="sums of squares"):
        quantize_calibrated(weight, BlockSpec("nf4"), -torch.ones(192))
