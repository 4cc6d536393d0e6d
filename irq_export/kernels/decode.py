"""Decoding in one pass: codes, double-quantised scale and offset to bf16, fp16 or fp32.

Every weight is read as its code and written once; scale and offset are expanded beside it. A program owns
some whole blocks; blocks lie one after the other, so the row a block belongs to does not matter.
"""

# mypy: disable-error-code="import-not-found,no-untyped-def,no-untyped-call,untyped-decorator,misc"
# ruff: noqa: N803, N806 - constants of a Triton kernel are written in capitals

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from irq_export.block_linear import Parts
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import GROUP_SIZE, dynamic_map

__all__ = ["DTYPES", "decode"]

#: What the kernel writes.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCKS = 32  # blocks a program
_WARPS = 2


@triton.jit
def _expand(stored, absmax, mean, table, block, inside, GROUP: tl.constexpr, NESTED: tl.constexpr):
    """Scale or offset f32 of blocks: read, or map[index] * absmax[group] + mean."""
    value = tl.load(stored + block, mask=inside, other=0)
    if NESTED:
        group = tl.load(absmax + block // GROUP, mask=inside, other=0.0)
        value = tl.load(table + value.to(tl.int32), mask=inside, other=0.0) * group + mean
    return value.to(tl.float32)


@triton.jit
def _decode_kernel(
    out,
    codes,
    scale,
    scale_absmax,
    scale_offset,
    tau,
    tau_absmax,
    levels,
    table,
    count,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED_SCALE: tl.constexpr,
    HALF_SCALE: tl.constexpr,
    HAS_TAU: tl.constexpr,
    NESTED_TAU: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Blocks ``(count, SIZE)`` of the result; one rounding per operation (launched without contraction)."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < count
    mean = tl.load(scale_offset) if NESTED_SCALE else 0.0
    s = _expand(scale, scale_absmax, mean, table, block, inside, GROUP, NESTED_SCALE)
    if HALF_SCALE:
        s = s.to(tl.float16).to(tl.float32)

    element = tl.arange(0, SIZE)[None, :]
    both = inside[:, None]
    row = codes + block.to(tl.int64)[:, None] * (SIZE * BITS // 8)
    if BITS == 8:
        code = tl.load(row + element, mask=both, other=0).to(tl.int32)
    else:
        PLANE: tl.constexpr = 4 if BITS == 4 else 2  # bits of a plane that share a byte
        BYTES: tl.constexpr = SIZE * PLANE // 8
        packed = tl.load(row + element % BYTES, mask=both, other=0).to(tl.int32)
        code = (packed >> (element // BYTES * PLANE)) & (2**PLANE - 1)
        if BITS == 3:
            high = tl.load(row + BYTES + element // 8, mask=both, other=0).to(tl.int32)
            code |= ((high >> (element % 8)) & 1) << 2
    weight = tl.load(levels + code) * s[:, None]
    if HAS_TAU:
        t = _expand(tau, tau_absmax, 0.0, table, block, inside, GROUP, NESTED_TAU)
        weight += t[:, None]
    elif BITS != 8:
        weight += 0.0  # turns -0 into 0, as the specification does
    target = out + block.to(tl.int64)[:, None] * SIZE + element
    tl.store(target, weight.to(out.dtype.element_ty), mask=both)


@cache
def _tables(codebook: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels f32 (2**bits,), for int8 in the order of the unsigned byte; the dynamic map f32 (256,)."""
    levels = torch.tensor(CODEBOOKS[codebook].levels, device=device)
    return levels.roll(128) if codebook == "int8" else levels, torch.tensor(dynamic_map(), device=device)


def decode(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Decode a matrix on CUDA, bit for bit as :func:`irq_export.block_linear.decode` does in torch.

    Args:
        parts: What is stored, contiguous.
        dtype: One of :data:`DTYPES`.

    Returns:
        ``(out, in)``.
    """
    out = parts.codes.new_empty(parts.shape, dtype=dtype)
    levels, table = _tables(parts.codebook, parts.codes.device)
    count = parts.scale.numel()
    nested_scale, nested_tau = parts.scale_absmax is not None, parts.tau_absmax is not None
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(count, _BLOCKS),)](
            out,
            parts.codes,
            parts.scale,
            parts.scale_absmax,
            parts.scale_offset,
            parts.tau,
            parts.tau_absmax,
            levels,
            table,
            count,
            BITS=CODEBOOKS[parts.codebook].bits,
            SIZE=parts.block_size,
            GROUP=GROUP_SIZE,
            NESTED_SCALE=nested_scale,
            HALF_SCALE=nested_scale and parts.scale_rounding == "fp16",
            HAS_TAU=parts.tau is not None,
            NESTED_TAU=nested_tau,
            BLOCKS=_BLOCKS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return out
