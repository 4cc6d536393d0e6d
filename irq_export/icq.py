"""Quantise a weight matrix: ICQ search, least-squares refit, storage (IR-QLoRA, arXiv 2402.05445, §3.2).

The search (irq_export.icq_search) finds a scale and an offset per block; irq_formats.blocks stores them and
chooses the codes last, against what was really stored. ``numerics="reference"`` reproduces the released code
instead (irq_export.icq_reference). Blocks are independent, so a matrix is worked through in chunks of bounded
memory and the result depends neither on the chunk nor on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from irq_formats.blocks import BlockSpec, BlockTensor, encode, part_layout
from irq_formats.errors import UnsupportedModel, UsageError
from torch import Tensor

from irq_export.icq_reference import check_spec, nested_scale, nested_tau, reference_blocks
from irq_export.icq_search import ENTROPY_UNIT, SearchConfig, block_entropy, plain_entropy, search_blocks

__all__ = ["QuantizedWeight", "SearchConfig", "quantize_tensor"]

#: Largest magnitude searched: no threshold and no decoded value below it overflows float32.
_MAX_WEIGHT = 2.0**125
#: Default budget of temporaries, bytes: chunks that stay near a CPU's caches; a GPU is given more.
_CPU_BUDGET, _CUDA_BUDGET = 1 << 25, 1 << 32


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised matrix and what the quantisation did to it.

    Attributes:
        block: The stored tensor; its ``spec`` shows a storage that had to be promoted.
        entropy_before: Mean entropy of a block's codes without search and offset, bits.
        entropy_after: Mean entropy of a block's stored codes, bits.
        rel_mse: ``sum (w - dequantised)**2 / sum w**2``; 0 for a matrix of zeros.
    """

    block: BlockTensor
    entropy_before: float
    entropy_after: float
    rel_mse: float


def quantize_tensor(
    weight: Tensor,
    spec: BlockSpec,
    search: SearchConfig | None = None,
    *,
    where: str = "weight",
    budget: int | None = None,
) -> QuantizedWeight:
    """Quantise a matrix.

    Args:
        weight: ``(out, in)``, float32, float16 or bfloat16 (converted to float32 first), CPU or CUDA.
        spec: Codebook and storage.
        search: How scale and offset are found; the default is ICQ with ties by error and a refit.
        where: Name of the tensor, for errors.
        budget: Bytes of temporary memory beside the matrix itself; the result does not depend on it.

    Returns:
        The stored tensor with its entropy before and after and its relative squared error.

    Raises:
        UnsupportedModel: Not a matrix of whole blocks, not finite, or magnitudes the storage cannot hold.
        UsageError: ICQ without storage for offsets, int8, or a storage the released numerics do not have.
    """
    config = search or SearchConfig()
    _check(weight, spec, config, where)
    blocks = weight.detach().to(torch.float32).contiguous().view(-1, spec.block_size)
    if budget is None:
        budget = _CUDA_BUDGET if blocks.is_cuda else _CPU_BUDGET
    chunks = torch.split(blocks, max(1, budget // _bytes_per_block(spec, config)))
    if any(not bool(chunk.abs().amax() <= _MAX_WEIGHT) for chunk in chunks):
        raise UnsupportedModel(
            "not a quantisable weight",
            where=where,
            expected=f"finite values of magnitude at most {_MAX_WEIGHT:g}",
            got=f"{int((~blocks.isfinite()).sum())} values that are not finite"
            if not bool(blocks.isfinite().all())
            else f"{float(blocks.abs().amax()):g}",
        )
    before = sum(plain_entropy(chunk, spec.codebook) for chunk in chunks)
    shape = (weight.shape[0], weight.shape[1])
    if config.numerics == "reference":
        block = _quantize_reference(chunks, shape, spec, config)
    else:
        pairs = max(1, budget // (32 * spec.block_size))
        found = [
            search_blocks(chunk, spec.codebook, config, with_tau=spec.tau != "none", pairs_at_once=pairs)
            for chunk in chunks
        ]
        scale, tau = (torch.cat(part).view(shape[0], -1).cpu().numpy() for part in zip(*found, strict=True))
        block = encode(blocks.view(shape).cpu().numpy(), scale, tau, spec)
    return _measured(blocks.view(shape), block, before)


def _check(weight: Tensor, spec: BlockSpec, config: SearchConfig, where: str) -> None:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedModel(
            "weight dtype", where=where, expected="float32, float16 or bfloat16", got=weight.dtype
        )
    if weight.ndim != 2:
        raise UnsupportedModel("not a matrix", where=where, expected="(out, in)", got=tuple(weight.shape))
    part_layout(spec, (weight.shape[0], weight.shape[1]))
    if spec.codebook == "int8":
        raise UsageError("int8 has nothing to search", where=where, hint="Use irq_formats.blocks.encode_int8")
    if config.icq and spec.tau == "none":
        raise UsageError(
            "ICQ finds an offset, and the storage holds none", where=where, hint="Set tau, or icq=False"
        )
    if config.numerics == "reference":
        check_spec(spec, config)


def _bytes_per_block(spec: BlockSpec, config: SearchConfig) -> int:
    """Temporaries of the search for one block: candidates (pairs, entropy, mask) and a few sorted copies."""
    return (2 * config.tau_steps + 1) * 40 + spec.block_size * 64 + (1 << spec.bits) * 40


def _quantize_reference(
    chunks: tuple[Tensor, ...], shape: tuple[int, int], spec: BlockSpec, config: SearchConfig
) -> BlockTensor:
    """The released code's codes and nested state of chunks f32 (n, B)."""
    found = [reference_blocks(chunk, spec.codebook, config) for chunk in chunks]
    codes, scale, tau = (torch.cat(part) for part in zip(*found, strict=True))
    nested = (shape[0], shape[1] // spec.block_size)
    index, absmax, offset = nested_scale(scale)
    parts: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
        "codes": spec.codec.pack(codes.view(shape).cpu().numpy()),
        "scale": index.reshape(nested),
        "scale_absmax": absmax,
        "scale_offset": offset,
    }
    if spec.tau != "none":
        tau_index, tau_absmax = nested_tau(tau)
        parts |= {"tau": tau_index.reshape(nested), "tau_absmax": tau_absmax}
    return BlockTensor(spec, shape, parts)


def _measured(weight: Tensor, block: BlockTensor, before: int) -> QuantizedWeight:
    """Add entropies and error of a stored tensor; ``before`` is in fixed point, summed over blocks."""
    spec, (out, width) = block.spec, block.shape
    codes, scale, tau = block.codes(), block.scale(), block.tau()
    after, error, norm = 0, 0.0, 0.0
    rows = max(1, (1 << 22) // width)
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        after += block_entropy(torch.from_numpy(codes[part].reshape(-1, spec.block_size)), spec.codebook)
        w = weight[part].cpu().numpy().astype(np.float64)
        decoded = spec.codec.decode(codes[part], scale[part], tau[part])
        error += float(np.square(w - decoded).sum())
        norm += float(np.square(w).sum())
    unit = ENTROPY_UNIT * scale.size
    return QuantizedWeight(block, before / unit, after / unit, error / norm if norm else 0.0)
