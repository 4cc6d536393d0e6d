"""Quantise a weight matrix: ICQ search, least-squares refit, storage (IR-QLoRA, arXiv 2402.05445, §3.2).

The search (irq_export.icq_search) finds a scale and an offset per block; irq_formats.blocks stores them and
chooses the codes last, against what was really stored. ``numerics="reference"`` reproduces the released code
instead (irq_export.icq_reference). Blocks are independent but for the storage of their scales and offsets, so
a matrix is worked through twice, some rows at a time: search everything, store, then choose the codes. The
result depends neither on the chunk nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irq_export.block_linear import decode_blocks, pack_codes, unpack_codes
from irq_export.icq_reference import check_spec, nested_scale, nested_tau, reference_blocks
from irq_export.icq_search import (
    ENTROPY_UNIT,
    SearchConfig,
    block_codes,
    block_entropy,
    plain_entropy,
    runs_natively,
    search_blocks,
)
from irq_formats.blocks import BlockSpec, BlockTensor, part_layout, store_scales
from irq_formats.errors import UnsupportedModel, UsageError

__all__ = ["QuantizedWeight", "SearchConfig", "check_settings", "quantize_rows", "quantize_tensor"]

#: Largest magnitude searched: no threshold and no decoded value below it overflows float32.
_MAX_WEIGHT = 2.0**125
#: Default budget of temporaries, bytes: chunks that stay near a CPU's caches; a GPU is given more.
_CPU_BUDGET, _CUDA_BUDGET = 1 << 25, 1 << 32
#: Weights whose codes are chosen together, for the same reason.
_MEASURED_ELEMENTS, _CUDA_ELEMENTS = 1 << 19, 1 << 25
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


class _Finished(NamedTuple):
    """Rows with their codes: packed ``(rows, bytes)``; entropy (fixed point), squared error, squared norm."""

    packed: U8
    entropy: int
    error: float
    norm: float


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
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedModel(
            "weight dtype", where=where, expected="float32, float16 or bfloat16", got=weight.dtype
        )
    if weight.ndim != 2:
        raise UnsupportedModel("not a matrix", where=where, expected="(out, in)", got=tuple(weight.shape))
    shape = (weight.shape[0], weight.shape[1])
    weight = weight.detach()
    return quantize_rows(lambda rows: weight[rows], shape, spec, search, where=where, budget=budget)


def quantize_rows(
    read: Callable[[slice], Tensor],
    shape: tuple[int, int],
    spec: BlockSpec,
    search: SearchConfig | None = None,
    *,
    where: str = "weight",
    budget: int | None = None,
) -> QuantizedWeight:
    """Quantise a matrix of any size in bounded memory: every row is read twice, a few rows at a time.

    Args:
        read: Returns some rows, ``(rows, in)``, in a floating-point dtype, on the device that is to search.
        shape: ``(out, in)``.
        spec: As for :func:`quantize_tensor`, as are the others, the result and the errors.
        search: How scale and offset are found.
        where: Name of the tensor, for errors.
        budget: Bytes of temporary memory beside the result.
    """
    config = search or SearchConfig()
    part_layout(spec, shape)
    check_settings(spec, config)
    device = read(slice(0, 1)).device
    if budget is None:
        budget = _CUDA_BUDGET if device.type == "cuda" else _CPU_BUDGET
    reference = config.numerics == "reference"
    native = not reference and runs_natively(device, config)
    at_once = max(1, budget // _bytes_per_block(spec, None if native else config))
    packed = np.empty(part_layout(spec, shape)["codes"][1], np.uint8)
    scales, taus, before = [], [], 0
    for rows in _row_slices(shape, at_once * spec.block_size):
        released_codes = []
        for blocks in torch.split(_blocks(read(rows), spec, where), at_once):
            before += plain_entropy(blocks, spec.codebook)
            if reference:
                codes, scale, tau = reference_blocks(blocks, spec.codebook, config)
                released_codes.append(codes.cpu())
            else:
                pairs = max(1, budget // (32 * spec.block_size))
                with_tau = spec.tau != "none"
                scale, tau = search_blocks(
                    blocks, spec.codebook, config, with_tau=with_tau, pairs_at_once=pairs
                )
            scales.append(scale.cpu())
            taus.append(tau.cpu())
        if reference:
            packed[rows] = spec.codec.pack(torch.cat(released_codes).view(-1, shape[1]).numpy())
    store = _store_released if reference else _store_exact
    stored = store(torch.cat(scales), torch.cat(taus), spec, shape)
    block = replace(stored, parts={"codes": packed, **stored.parts})
    after, rel_mse = _finish(block, read, choose_codes=not reference)
    unit = ENTROPY_UNIT * (packed.size * 8 // (spec.bits * spec.block_size))
    return QuantizedWeight(block, before / unit, after / unit, rel_mse)


def check_settings(spec: BlockSpec, config: SearchConfig) -> None:
    """Check that storage and search go together, before a weight is read.

    Raises:
        UsageError: ICQ without storage for offsets, int8, or a storage the released numerics do not have.
    """
    if spec.codebook == "int8":
        raise UsageError("int8 has nothing to search", hint="Use irq_formats.blocks.encode_int8")
    if config.icq and spec.tau == "none":
        raise UsageError(
            "ICQ finds an offset, and tau none stores none",
            hint="Store it (tau dq8, f16 or f32), or switch the search off (--no-icq)",
        )
    if config.numerics == "reference":
        check_spec(spec, config)


def _bytes_per_block(spec: BlockSpec, config: SearchConfig | None) -> int:
    """Temporaries for one block: its copies, and where torch searches, candidates (pairs, entropy, mask)."""
    if config is None:
        return spec.block_size * 16
    return (2 * config.tau_steps + 1) * 40 + spec.block_size * 64 + (1 << spec.bits) * 40


def _row_slices(shape: tuple[int, int], elements: int) -> Iterator[slice]:
    """Cut a matrix into whole rows of at most ``elements`` elements, one row at least."""
    step = max(1, elements // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _blocks(weight: Tensor, spec: BlockSpec, where: str) -> Tensor:
    """Return rows ``(rows, in)`` as blocks f32 (n, B), after checking that they can be searched."""
    blocks = weight.to(torch.float32).contiguous().view(-1, spec.block_size)
    if not bool(blocks.abs().amax() <= _MAX_WEIGHT):
        raise UnsupportedModel(
            "not a quantisable weight",
            where=where,
            expected=f"finite values of magnitude at most {_MAX_WEIGHT:g}",
            got=f"{int((~blocks.isfinite()).sum())} values that are not finite"
            if not bool(blocks.isfinite().all())
            else f"{float(blocks.abs().amax()):g}",
        )
    return blocks


def _store_exact(scale: Tensor, tau: Tensor, spec: BlockSpec, shape: tuple[int, int]) -> BlockTensor:
    """Store scales and offsets f32 (blocks,); the codes are still to be chosen."""
    return store_scales(scale.view(shape[0], -1).numpy(), tau.view(shape[0], -1).numpy(), spec, shape)


def _store_released(scale: Tensor, tau: Tensor, spec: BlockSpec, shape: tuple[int, int]) -> BlockTensor:
    """The nested state of the released code for scales and offsets f32 (blocks,)."""
    index, absmax, offset = nested_scale(scale)
    parts: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
        "scale": index.reshape(shape[0], -1),
        "scale_absmax": absmax,
        "scale_offset": offset,
    }
    if spec.tau != "none":
        tau_index, tau_absmax = nested_tau(tau)
        parts |= {"tau": tau_index.reshape(shape[0], -1), "tau_absmax": tau_absmax}
    return BlockTensor(spec, shape, parts)


def _finish(block: BlockTensor, read: Callable[[slice], Tensor], *, choose_codes: bool) -> tuple[int, float]:
    """Second pass: choose the codes against what was stored (in place), and measure.

    Returns:
        Entropy of the codes in fixed point, summed over blocks; relative squared error.
    """
    device = read(slice(0, 1)).device
    native = choose_codes and runs_natively(device)
    scale, tau, packed = block.scale(), block.tau(), block.parts["codes"].view(np.uint8)
    entropy, error, norm = 0, 0.0, 0.0
    for rows in _row_slices(block.shape, _CUDA_ELEMENTS if device.type == "cuda" else _MEASURED_ELEMENTS):
        weight, given = read(rows).float(), None if choose_codes else packed[rows]
        if native:
            done = _finish_natively(weight, scale[rows], tau[rows], block.spec)
        else:
            done = _finish_in_torch(weight, scale[rows], tau[rows], given, block.spec)
        packed[rows] = done.packed
        entropy, error, norm = entropy + done.entropy, error + done.error, norm + done.norm
    return entropy, error / norm if norm else 0.0


def _finish_natively(weight: Tensor, scale: F32, tau: F32, spec: BlockSpec) -> _Finished:
    """Choose and measure the codes of rows f32 (rows, in) on a CPU."""
    from irq_export import icq_native

    done = icq_native.encode(
        weight.reshape(-1, spec.block_size), scale.reshape(-1), tau.reshape(-1), spec.codebook
    )
    return _Finished(done.packed.reshape(len(weight), -1), done.entropy, done.error, done.norm)


def _finish_in_torch(weight: Tensor, scale: F32, tau: F32, packed: U8 | None, spec: BlockSpec) -> _Finished:
    """The same in torch, or measure the codes given: equal codes and entropy, sums in another order."""
    s, t = (torch.from_numpy(x).to(weight.device) for x in (scale, tau))
    if packed is None:
        blocks = weight.reshape(-1, spec.block_size)
        codes = block_codes(blocks, s.view(-1), t.view(-1), spec.codebook)
        stored = pack_codes(codes, spec.bits).view(len(weight), -1)
    else:
        stored = torch.from_numpy(packed).to(weight.device)
        codes = unpack_codes(stored, spec.bits, spec.block_size)
    exact = weight.double()
    error = (exact - decode_blocks(stored, s, t, spec.codebook, spec.block_size)).square().sum()
    entropy = block_entropy(codes, spec.codebook)
    return _Finished(stored.cpu().numpy(), entropy, float(error), float(exact.square().sum()))
