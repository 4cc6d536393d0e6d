"""The quantised bases of the reproduction: every method of search on the same full-precision model."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from _reproduce_model import KINDS, Arms, Shape, Weights
from torch import Tensor

from irq_export.icq import QuantizedWeight, SearchConfig, quantize_tensor
from irq_export.icq_calibrated import feedback_codes, nearest_codes, weighted_pairs
from irq_export.icq_search import ENTROPY_UNIT, block_entropy
from irq_formats.blocks import BlockSpec, store_scales
from irq_formats.codebooks import CODEBOOKS

__all__ = ["METHODS", "Base", "input_moments", "quantise"]

#: The search of each base; calibrated ones have none. Storage is dq8 for all, so nf4 takes 4.254 bits with an
#: offset and 4.127 without.
METHODS: dict[str, SearchConfig | bool] = {
    "plain": SearchConfig(icq=False, refine="none"),
    "ICQ": SearchConfig(tie="first", refine="none"),
    "ICQ, ties by error": SearchConfig(refine="none"),
    "plain + refit": SearchConfig(icq=False),
    "ICQ + refit": SearchConfig(),
    "error search + refit": SearchConfig(objective="mse"),
    "calibrated refit": False,  # weighted pairs, nearest codes
    "calibrated": True,  # weighted pairs, error feedback
}
#: Kinds that read the same input.
_SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


@dataclass(frozen=True)
class Base:
    """A quantised base.

    Attributes:
        linears: Dequantised weights, ``(layers, out, in)`` of each kind.
        facts: entropy (bits), rel_mse, bits_per_weight, seconds.
    """

    linears: dict[str, Tensor]
    facts: dict[str, float]


@torch.no_grad()
def input_moments(shape: Shape, weights: Weights, windows: Tensor, at_once: int = 16) -> dict[str, Tensor]:
    """Second moments of the inputs of every linear over token windows (n, L).

    Returns:
        float32 ``(layers, in, in)`` of each kind, averaged over tokens.
    """
    moments = {
        kind: torch.zeros((shape.layers, *[shape.linear(kind)[1]] * 2), device=windows.device)
        for kind in KINDS
        if kind not in _SAME_INPUT
    }
    model = Arms(shape, weights)

    def watch(kind: str, layer: int, x: Tensor) -> None:
        if kind in moments:
            rows = x[0].float()
            moments[kind][layer] += rows.mT @ rows

    model.watch = watch
    for part in torch.split(windows, at_once):
        model.hidden(part[None])
    for total in moments.values():
        total /= windows.numel()
    return moments | {kind: moments[other] for kind, other in _SAME_INPUT.items()}


def quantise(
    linears: dict[str, Tensor],
    codebook: str,
    method: str,
    moments: dict[str, Tensor],
    dtype: torch.dtype,
    jobs: int = 8,
) -> Base:
    """Quantise every matrix, float32 ``(layers, out, in)`` of each kind, in blocks of 64.

    Args:
        linears: The full-precision weights.
        codebook: Of the codes.
        method: Name in `METHODS`.
        moments: Of :func:`input_moments`.
        dtype: Of the dequantised weights.
        jobs: Matrices in work at a time.
    """
    search = METHODS[method]
    spec = BlockSpec(codebook, 64, scale="dq8", tau="none" if method == "plain" else "dq8")
    if not isinstance(search, SearchConfig):
        return _calibrated(linears, spec, moments, dtype, feedback=search)

    def one(job: tuple[str, int]) -> QuantizedWeight:
        kind, layer = job
        done = quantize_tensor(linears[kind][layer], spec, search, where=f"{kind} {layer}")
        decoded[kind][layer].copy_(torch.from_numpy(done.block.dequantize()))
        return done

    jobs_in_order = [(kind, layer) for kind in KINDS for layer in range(len(linears[kind]))]
    decoded = {kind: torch.empty_like(weight, dtype=dtype) for kind, weight in linears.items()}
    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(one, jobs_in_order))
    if linears["q"].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    size = np.array([linears[kind][layer].numel() for kind, layer in jobs_in_order])
    norm = np.array([float(linears[kind][layer].double().square().sum()) for kind, layer in jobs_in_order])
    facts = {
        "entropy": float(np.average([d.entropy_after for d in done], weights=size)),
        "rel_mse": float(np.average([d.rel_mse for d in done], weights=norm)),
        "bits_per_weight": float(np.average([d.block.bits_per_weight for d in done], weights=size)),
        "seconds": seconds,
    }
    return Base(decoded, facts)


def _calibrated(
    linears: dict[str, Tensor],
    spec: BlockSpec,
    moments: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    feedback: bool,
) -> Base:
    """irq_export.icq_calibrated.quantize_calibrated for all layers of a kind at a time."""
    decoded, entropy, error, norm, nbytes, count = {}, 0, 0.0, 0.0, 0, 0
    levels = torch.tensor(CODEBOOKS[spec.codebook].levels, device=linears["q"].device)
    start = time.perf_counter()
    for kind, weight in linears.items():
        stored = []
        for matrix, h in zip(weight, moments[kind], strict=True):
            blocks = matrix.view(matrix.shape[0], -1, spec.block_size)
            pair = weighted_pairs(blocks, h.diagonal().reshape(-1, spec.block_size), spec.codebook)
            scale, tau = (x.cpu().numpy() for x in pair)
            stored.append(store_scales(scale, tau, spec, (matrix.shape[0], matrix.shape[1])))
        scale, tau = (
            torch.stack([torch.from_numpy(x) for x in xs]).to(weight.device)
            for xs in ([s.scale() for s in stored], [s.tau() for s in stored])
        )
        blocks = weight.view(*scale.shape, spec.block_size)
        if feedback:
            codes = feedback_codes(weight, scale, tau, moments[kind], spec.codebook).view(blocks.shape)
        else:
            codes = nearest_codes(blocks, scale, tau, spec.codebook).to(torch.uint8)
        values = levels[codes.int()] * scale[..., None] + tau[..., None]
        decoded[kind] = values.view(weight.shape).to(dtype)
        entropy += block_entropy(codes.view(-1, spec.block_size), spec.codebook)
        error += float((values - blocks).double().square().sum())
        norm += float(weight.double().square().sum())
        nbytes += sum(s.nbytes for s in stored) + codes.numel() * spec.bits // 8
        count += codes.numel()
    facts = {
        "entropy": entropy / ENTROPY_UNIT / count * spec.block_size,
        "rel_mse": error / norm,
        "bits_per_weight": 8 * nbytes / count,
        "seconds": time.perf_counter() - start,
    }
    return Base(decoded, facts)
