"""The released numerics: IR-QLoRA's published code and bitsandbytes' NF4, bit for bit (facts ir-qlora §1).

What differs from the exact search (irq_export.icq_search):

* the codes are chosen against the unquantised pair: ``x * (1 / max(s, 1e-38))``, clamped to [-1, 1], counted
  against the midpoints; the stored scale and offset are quantised afterwards and never corrected for;
* with ICQ, ``w - tau`` is rounded to fp16 before s and the codes are taken (``Params4bit`` is half);
* entropy is a float32 sum over the codes in ascending order (torch's own on a CPU for every shape the
  released code accepts, those of whole groups of 256 blocks); a candidate must be strictly better than all
  before it;
* double quantisation of s is bitsandbytes' CPU kernel: the mean subtracted, ``x * (1 / absmax)`` placed on a
  grid of 65536 points, each of which knows its nearest map value; that of tau is an argmin over the map.

``icq=False`` is QLoRA: every array equals ``bitsandbytes.functional.quantize_4bit(..., quant_type="nf4",
compress_statistics=True)`` of bitsandbytes 0.50 on a CPU. The released code ran on CUDA, whose order of
summation and whose index rule of s can differ in the last place; a reference model in bf16 is not imitated.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irq_export.icq_search import SIGMA, SearchConfig
from irq_formats.blocks import BlockSpec
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import GROUP_SIZE, dynamic_map, group_count
from irq_formats.errors import UnsupportedModel, UsageError

__all__ = ["check_spec", "nested_scale", "nested_tau", "reference_blocks"]

_GRID = 65535  # steps of the index grid of bitsandbytes' CPU kernel


def check_spec(spec: BlockSpec, config: SearchConfig) -> None:
    """Refuse what the released code cannot store.

    Raises:
        UsageError: Other than nf4, dq8 scales without fp16 rounding, and dq8 offsets exactly with ICQ.
    """
    wanted = ("nf4", "dq8", "none", "dq8" if config.icq else "none")
    got = (spec.codebook, spec.scale, spec.scale_rounding, spec.tau)
    if got != wanted:
        raise UsageError(
            "numerics reference stores only what the released code stores",
            expected="codebook {}, scale {}, scale_rounding {}, tau {}".format(*wanted),
            got="{}, {}, {}, {}".format(*got),
        )


def _residual(blocks: Tensor, tau: Tensor) -> Tensor:
    """``w - tau`` in fp16, returned as f32 (n, B); order within a block is kept."""
    residual = (blocks - tau[:, None]).half().float()
    if not residual.isfinite().all():
        raise UnsupportedModel(
            "a weight minus its offset exceeds fp16", hint="Use numerics exact, which needs no fp16"
        )
    return residual


def _scaled(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return residuals over their absmax, f32 (n, B), and the absmax, f32 (n,)."""
    absmax = residual.abs().amax(dim=1)
    inverse = 1.0 / absmax.clamp(min=1e-38)
    return (residual * inverse[:, None]).clamp(-1, 1), absmax


def _entropy_terms(block_size: int, device: torch.device) -> Tensor:
    """``-p log2 p`` of every count 0..B, f32 (B + 1,), with log2(0) taken as 0."""
    p = torch.arange(block_size + 1, dtype=torch.float32) / block_size
    return torch.nan_to_num(-p * torch.log2(p), nan=0.0).to(device)


def _entropy(ordered: Tensor, tau: Tensor, midpoints: Tensor, terms: Tensor) -> Tensor:
    """Entropy f32 (n,) of the codes of sorted blocks f32 (n, B) at offset tau f32 (n,)."""
    scaled, _ = _scaled(_residual(ordered, tau))
    bounds = midpoints.expand(len(ordered), -1).contiguous()
    below = torch.searchsorted(scaled, bounds, right=True)
    edges = torch.nn.functional.pad(below, (1, 1))
    edges[:, -1] = ordered.shape[1]
    per_code = terms[edges.diff(dim=1)]
    entropy = torch.zeros_like(tau)
    for k in range(per_code.shape[1]):
        entropy += per_code[:, k]
    return entropy


def reference_blocks(blocks: Tensor, codebook: str, config: SearchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Search and encode as released.

    Args:
        blocks: float32 ``(n, B)``, one block a row.
        codebook: Name of the codebook; the released code knows nf4.
        config: ``icq``, ``tau_range`` and ``tau_steps`` are read.

    Returns:
        codes uint8 ``(n, B)``, s float32 ``(n,)`` and tau float32 ``(n,)``, both unquantised.

    Raises:
        UnsupportedModel: With ICQ, a residual exceeds fp16.
    """
    midpoints = torch.tensor(CODEBOOKS[codebook].midpoints, device=blocks.device)
    tau = torch.zeros(len(blocks), device=blocks.device)
    residual = blocks
    if config.icq:
        ordered = blocks.sort(dim=1).values
        tau0 = ordered[:, blocks.shape[1] // 2 - 1]
        reach = (blocks - tau0[:, None]).abs().amax(dim=1)
        terms = _entropy_terms(blocks.shape[1], blocks.device)
        limit = config.tau_range * SIGMA
        best = torch.full_like(tau, -1.0)
        for factor in np.linspace(-limit, limit, 2 * config.tau_steps + 1).tolist():
            candidate = factor * reach + tau0
            entropy = _entropy(ordered, candidate, midpoints, terms)
            tau = torch.where(entropy > best, candidate, tau)
            best = torch.maximum(best, entropy)
        residual = _residual(blocks, tau)
    scaled, scale = _scaled(residual)
    return torch.bucketize(scaled, midpoints).to(torch.uint8), scale, tau


def _groups(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cut values f32 (n,) into groups f32 (groups, 256), the last padded with 0; and each group's absmax."""
    padded = np.zeros(group_count(values.size) * GROUP_SIZE, np.float32)
    padded[: values.size] = values
    groups = padded.reshape(-1, GROUP_SIZE)
    return groups, np.abs(groups).max(axis=1)


def nested_scale(scale: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Double-quantise scales f32 (n,) as bitsandbytes' CPU kernel does.

    A group of absmax 0 gets index 0. The position on the grid is one fused multiply-add, as the library's
    compiled kernel has it: exact in float64, rounded to float32 once.

    Returns:
        index uint8 ``(n,)``, absmax float32 ``(groups,)``, offset float32 ``(1,)``.
    """
    scale = scale.cpu()
    offset = scale.mean()
    groups, absmax = _groups((scale - offset).numpy())
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    half = (np.clip(groups * inverse[:, None], -1, 1) + np.float32(1)) * np.float32(0.5)
    position = (half.astype(np.float64) * _GRID + 0.5).astype(np.float32).astype(np.int32)
    grid = (2 * np.arange(_GRID + 1)).astype(np.float32) / np.float32(_GRID) - np.float32(1)
    table = dynamic_map()
    nearest = np.searchsorted((table[:-1] + table[1:]) * np.float32(0.5), grid).astype(np.uint8)
    index = np.where(absmax[:, None] > 0, nearest[position], np.uint8(0))
    return index.reshape(-1)[: scale.numel()], absmax, offset.reshape(1).numpy()


def nested_tau(tau: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Double-quantise offsets f32 (n,): the map value nearest to ``tau / absmax``, of equal ones the lower.

    A group of absmax 0 gets index 0, as an argmin over NaN does in the released code; it decodes to -0.

    Returns:
        index uint8 ``(n,)``, absmax float32 ``(groups,)``.
    """
    groups, absmax = _groups(tau.cpu().numpy())
    index = np.zeros(groups.shape, np.uint8)
    table = dynamic_map()
    for g in np.flatnonzero(absmax):
        index[g] = np.abs((groups[g] / absmax[g])[:, None] - table).argmin(axis=1)
    return index.reshape(-1)[: tau.numel()], absmax
