"""Quantisation for the inputs a layer really sees: the same format and bits as ICQ, other numbers in it.

ICQ and the plain refit look at the weights alone. Here a calibration text gives, for every linear, the
second moments of its inputs, ``H = sum x x^T``, and what is made small is the error of the layer's output:

1. Scale and offset of a block: least squares weighted by ``diag(H)``, from a few starting scales, codes and
   pair in turn; the start that ends with the least weighted error wins.
2. The pairs are stored (irq_formats.blocks), and the codes are chosen last, column by column, against what
   was stored: the error of a column is fed forward into the columns still to come, as the Cholesky factor of
   ``H^-1`` prescribes (GPTQ, arXiv 2210.17323; here with the fixed pairs of irq-blocks, offset included).

Both are deterministic on a device, but not bit-equal between devices: the codes are stored, not searched
again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from irq_export.icq import QuantizedWeight
from irq_export.icq_search import ENTROPY_UNIT, block_entropy, plain_entropy
from irq_formats.blocks import BlockSpec, part_layout, store_scales
from irq_formats.codebooks import CODEBOOKS
from irq_formats.errors import UsageError

__all__ = ["feedback_codes", "nearest_codes", "quantize_calibrated", "weighted_pairs"]

#: Starting scales, as shares of the block's absolute maximum.
_STARTS = (1.0, 0.9, 0.8, 0.7)
#: Turns of codes and pair from each start.
_ROUNDS = 4
#: Weights whose pairs are found together: temporaries stay below 256 MiB.
_AT_ONCE = 1 << 22
#: Share of the mean of diag(H) added to it.
_DAMPING = 0.01


def nearest_codes(values: Tensor, scale: Tensor, tau: Tensor, codebook: str) -> Tensor:
    """Return int64 codes of values ``(..., n)`` at pairs ``(...)``; where the scale is 0, the zero code."""
    book = CODEBOOKS[codebook]
    midpoints = torch.tensor(book.midpoints, device=values.device)
    inverse = torch.where(scale > 0, scale, torch.inf).reciprocal()
    codes = torch.bucketize((values - tau[..., None]) * inverse[..., None], midpoints)
    return codes.masked_fill_((scale == 0)[..., None], book.zero_code)


def weighted_pairs(blocks: Tensor, importance: Tensor, codebook: str) -> tuple[Tensor, Tensor]:
    """Find scale and offset of every block by least squares weighted by the importance of its inputs.

    Args:
        blocks: float32 ``(out, nb, B)``.
        importance: float32 ``(nb, B)``, not negative: ``diag(H)`` of the inputs.
        codebook: Name of the codebook.

    Returns:
        scale float32 ``(out, nb)``, not negative, and tau float32 ``(out, nb)``.
    """
    levels = torch.tensor(CODEBOOKS[codebook].levels, device=blocks.device)
    share = importance + torch.finfo(torch.float32).tiny
    share = share / share.sum(dim=-1, keepdim=True)  # (nb, B), sums to 1
    mean = (share * blocks).sum(dim=-1, keepdim=True)
    reach = blocks.abs().amax(dim=-1) * (2 / (levels.max() - levels.min()))
    best_scale, best_tau = reach, torch.zeros_like(reach)
    least = torch.full_like(reach, torch.inf)
    for start in _STARTS:
        scale, tau = reach * start, torch.zeros_like(reach)
        for turn in range(_ROUNDS + 1):
            decoded = levels[nearest_codes(blocks, scale, tau, codebook)]  # (out, nb, B)
            error = (share * (decoded * scale[..., None] + tau[..., None] - blocks).square()).sum(dim=-1)
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_tau = torch.where(better, scale, best_scale), torch.where(better, tau, best_tau)
            if turn == _ROUNDS:
                break
            centre = (share * decoded).sum(dim=-1, keepdim=True)
            variance = (share * (decoded - centre).square()).sum(dim=-1)
            slope = (share * (decoded - centre) * (blocks - mean)).sum(dim=-1) / variance
            fits = (variance > 0) & (slope > 0)
            tau = torch.where(fits, mean[..., 0] - slope * centre[..., 0], tau)
            scale = torch.where(fits, slope, scale)
    constant = (blocks == blocks[..., :1]).all(dim=-1)
    return best_scale.masked_fill(constant, 0), torch.where(constant, blocks[..., 0], best_tau)


def feedback_codes(weight: Tensor, scale: Tensor, tau: Tensor, moments: Tensor, codebook: str) -> Tensor:
    """Choose codes column by column, feeding every error forward into the columns still to come.

    Args:
        weight: float32 ``(..., out, in)``.
        scale: Effective scales, float32 ``(..., out, nb)``.
        tau: Effective offsets, float32 ``(..., out, nb)``.
        moments: H, ``(..., in, in)``.
        codebook: Name of the codebook.

    Returns:
        Codes uint8 ``(..., out, in)``.
    """
    book = CODEBOOKS[codebook]
    levels = torch.tensor(book.levels, device=weight.device)
    size = weight.shape[-1] // scale.shape[-1]
    factor = _feedback_factor(moments)
    left = weight.clone()  # what is still to be coded, errors fed forward
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for block in range(scale.shape[-1]):
        columns = slice(block * size, (block + 1) * size)
        s, t = scale[..., block], tau[..., block]  # (..., out)
        here, upper = left[..., columns].clone(), factor[..., columns, columns]
        errors = torch.empty_like(here)
        for j in range(size):
            value = here[..., j]
            code = nearest_codes(value[..., None], s, t, codebook)[..., 0]
            codes[..., block * size + j] = code.to(torch.uint8)
            error = (value - (levels[code] * s + t)) / upper[..., j, j, None]
            here[..., j:] -= error[..., None] * upper[..., j, None, j:]
            errors[..., j] = error
        left[..., columns.stop :] -= errors @ factor[..., columns, columns.stop :]
    return codes


def _feedback_factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor, float32, of the inverse of the damped moments; inputs never seen count as 1."""
    damped = moments.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    diagonal += torch.where(mean > 0, mean * _DAMPING, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def quantize_calibrated(
    weight: Tensor, spec: BlockSpec, moments: Tensor, *, where: str = "weight"
) -> QuantizedWeight:
    """Quantise a matrix for the inputs it sees.

    Args:
        weight: ``(out, in)``, floating point.
        spec: Codebook and storage; it must store offsets.
        moments: Of its inputs, on the device of the weight: the diagonal of H, ``(in,)``, for calibrated
            pairs and the nearest codes; or all of H, ``(in, in)``, to feed the errors forward too.
        where: Name of the tensor, for errors.

    Returns:
        The stored tensor with its entropy before and after and its relative squared error (of the weights:
        what is made small is that of the outputs).

    Raises:
        UsageError: int8, no storage for offsets, or moments of another width or sign.
        UnsupportedModel: Not a matrix of whole blocks, or magnitudes the storage cannot hold.
    """
    if spec.codebook == "int8" or spec.tau == "none":
        raise UsageError(
            "calibration finds a scale and an offset",
            where=where,
            expected="a codebook to search and storage for offsets",
            got=f"{spec.codebook}, tau {spec.tau}",
        )
    shape = (weight.shape[0], weight.shape[1])
    part_layout(spec, shape)
    if tuple(moments.shape) not in ((shape[1],), (shape[1],) * 2):
        raise UsageError(
            "moments of another layer", where=where, expected=f"{shape[1]} inputs", got=tuple(moments.shape)
        )
    diagonal = moments if moments.ndim == 1 else moments.diagonal()
    if not bool((diagonal >= 0).all()) or not bool(moments.isfinite().all()):
        raise UsageError("moments are sums of squares", where=where, expected="finite, not negative")
    exact = weight.detach().float()
    blocks = exact.reshape(shape[0], -1, spec.block_size)
    importance = diagonal.float().reshape(-1, spec.block_size)
    rows = max(1, _AT_ONCE // shape[1])
    pairs = [weighted_pairs(some, importance, spec.codebook) for some in torch.split(blocks, rows)]
    scale, tau = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    stored = store_scales(scale.cpu().numpy(), tau.cpu().numpy(), spec, shape)
    if moments.ndim == 1:
        codes = spec.codec.encode(exact.cpu().numpy(), stored.scale(), stored.tau())
    else:
        scale, tau = (torch.from_numpy(x).to(exact.device) for x in (stored.scale(), stored.tau()))
        codes = feedback_codes(exact, scale, tau, moments, spec.codebook).cpu().numpy()
    block = replace(stored, parts={"codes": spec.codec.pack(codes), **stored.parts})
    norm = float(exact.double().square().sum())
    error = float((exact.cpu().double() - torch.from_numpy(block.dequantize())).square().sum())
    unit = ENTROPY_UNIT * exact.numel() // spec.block_size
    return QuantizedWeight(
        block,
        plain_entropy(blocks.flatten(0, 1), spec.codebook) / unit,
        block_entropy(torch.from_numpy(codes.reshape(-1, spec.block_size)), spec.codebook) / unit,
        error / norm if norm else 0.0,
    )
