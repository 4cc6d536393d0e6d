"""Decoding of block-quantised matrices in torch, and the linear product that keeps no decoded weight.

The arithmetic is that of :mod:`irq_formats.blocks`, bit for bit: float32, one rounding per operation, then
one cast to the dtype of the activations. :func:`block_linear` saves the stored parts for its backward pass
and decodes them a second time there: what a layer keeps between the passes is its input and nothing of the
size of the weight. On CUDA one Triton kernel decodes (:mod:`irq_export.kernels`), elsewhere torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from irq_export import kernels
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import GROUP_SIZE, dynamic_map
from irq_formats.packing import block_bytes

__all__ = [
    "Parts",
    "block_linear",
    "compute_dtype",
    "decode",
    "decode_blocks",
    "effective_scale",
    "effective_tau",
    "pack_codes",
    "product",
    "product_gradients",
    "select_rows",
    "unpack_codes",
]


class Parts(NamedTuple):
    """The stored arrays of a matrix ``(out, in)`` and how to read them (``part_layout``).

    Attributes:
        codes: Packed codes, uint8 ``(out, in * bits / 8)``.
        scale: ``(out, nb)``: uint8 indices (dq8), float16 or float32.
        scale_absmax: float32 ``(ceil(out * nb / 256),)`` of a dq8 scale, else None.
        scale_offset: float32 ``(1,)`` of a dq8 scale, else None.
        tau: As scale, or None where the file has no offsets.
        tau_absmax: As scale_absmax.
        codebook: Name of the codebook.
        block_size: Weights per block, 32 or 64.
        scale_rounding: ``fp16`` or ``none``; counts for a dq8 scale.
    """

    codes: Tensor
    scale: Tensor
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    tau: Tensor | None
    tau_absmax: Tensor | None
    codebook: str
    block_size: int
    scale_rounding: str

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the matrix."""
        return self.scale.shape[0], self.scale.shape[1] * self.block_size


@cache
def _levels(codebook: str, device: torch.device) -> Tensor:
    """Levels of a codebook, float32 ``(2**bits,)``; for int8 in the order of the unsigned byte."""
    levels = CODEBOOKS[codebook].levels
    return torch.tensor(np.roll(levels, 128) if codebook == "int8" else levels, device=device)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    return torch.tensor(dynamic_map(), device=device)


def _take(table: Tensor, index: Tensor) -> Tensor:
    return torch.index_select(table, 0, index.reshape(-1).int()).view(index.shape)


def _pack_planes(codes: Tensor, bits: int) -> Tensor:
    planes = codes.view(codes.shape[0], 8 // bits, -1).unbind(1)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], 1):
        packed |= plane << (i * bits)
    return packed


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 ``(blocks, block_size)`` to ``(blocks, bytes)`` as :mod:`irq_formats.packing` does."""
    if bits != 3:
        return _pack_planes(codes, bits)
    place = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    high = ((codes >> 2).view(codes.shape[0], -1, 8) * place).sum(-1, dtype=torch.uint8)
    return torch.cat([_pack_planes(codes & 3, 2), high], dim=1)


def _unpack_planes(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=1)


def unpack_codes(packed: Tensor, bits: int, block_size: int) -> Tensor:
    """Codes uint8 ``(blocks, block_size)`` in row order, of bytes ``(rows, in * bits / 8)``."""
    blocks = packed.reshape(-1, block_bytes(bits, block_size))
    if bits == 8:
        return blocks
    if bits != 3:
        return _unpack_planes(blocks, bits)
    low, high = blocks[:, : block_size // 4], blocks[:, block_size // 4 :]
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    high_bits = ((high.unsqueeze(-1) >> bit) & 1).flatten(1)  # (blocks, block_size)
    return _unpack_planes(low, 2) | high_bits << 2


def _expand_dq8(index: Tensor, absmax: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    """Double-quantised values, float32 of the shape of ``index``, as :func:`decode_dq8` expands them."""
    group = absmax.repeat_interleave(GROUP_SIZE)[: index.numel()].view(index.shape)
    return _take(_dynamic_map(index.device), index) * group + mean


def effective_scale(parts: Parts) -> Tensor:
    """Effective scales, float32 ``(out, nb)``: exactly what decoding multiplies with."""
    if parts.scale_absmax is None or parts.scale_offset is None:
        return parts.scale.float()
    values = _expand_dq8(parts.scale, parts.scale_absmax, parts.scale_offset)
    return values.half().float() if parts.scale_rounding == "fp16" else values


def effective_tau(parts: Parts) -> Tensor | None:
    """Effective offsets, float32 ``(out, nb)``, or None where there are none."""
    if parts.tau is None:
        return None
    return parts.tau.float() if parts.tau_absmax is None else _expand_dq8(parts.tau, parts.tau_absmax)


def decode_blocks(codes: Tensor, scale: Tensor, tau: Tensor | None, codebook: str, block_size: int) -> Tensor:
    """Return ``fl32(fl32(scale * levels[code]) + tau)``.

    Args:
        codes: Packed, uint8 ``(rows, in * bits / 8)``.
        scale: Effective scales, float32 ``(rows, nb)``.
        tau: Effective offsets, float32 ``(rows, nb)``, or None for zero.
        codebook: Name of the codebook.
        block_size: Weights per block.

    Returns:
        float32 ``(rows, in)``.
    """
    weight = _take(_levels(codebook, codes.device), unpack_codes(codes, CODEBOOKS[codebook].bits, block_size))
    weight *= scale.reshape(-1, 1)
    if tau is not None:  # a second operation, never addcmul: the product is rounded first
        weight += tau.reshape(-1, 1)
    elif codebook != "int8":
        weight += 0.0  # as the specification: turns -0 into 0
    return weight.view(scale.shape[0], scale.shape[1] * block_size)


def _decode(parts: Parts, dtype: torch.dtype) -> Tensor:
    if dtype != torch.float64 and kernels.available(parts.codes.device):
        from irq_export.kernels.decode import decode as decode_on_gpu

        return decode_on_gpu(parts, dtype)
    scale, tau = effective_scale(parts), effective_tau(parts)
    return decode_blocks(parts.codes, scale, tau, parts.codebook, parts.block_size).to(dtype)


@torch.library.custom_op(
    "irq::decode",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor? scale_absmax, Tensor? scale_offset, Tensor? tau, "
    "Tensor? tau_absmax, str codebook, int block_size, str scale_rounding, ScalarType dtype, Tensor? after) "
    "-> Tensor",
)
def _decode_op(*args: Any) -> Tensor:
    """:func:`decode` as one operator for the compiler.

    ``after`` is not read. The backward pass names its gradient there, so that no compiler finds the two
    decodings of a layer equal and keeps the first one's result for the second.
    """
    *parts, dtype, _ = args
    return _decode(Parts(*parts), dtype)


@_decode_op.register_fake
def _(*args: Any) -> Tensor:
    *fields, dtype, _ = args
    parts = Parts(*fields)
    return parts.codes.new_empty(parts.shape, dtype=dtype)


def decode(parts: Parts, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """Decode a matrix.

    Args:
        parts: What is stored.
        dtype: Of the result; the arithmetic is float32.
        after: A tensor that the decoding must wait for in a compiled graph (see :func:`block_linear`).

    Returns:
        ``(out, in)``.
    """
    if torch.compiler.is_compiling():
        return torch.ops.irq.decode(*parts, dtype, after)  # type: ignore[no-any-return]
    return _decode(parts, dtype)


def select_rows(parts: Parts, rows: Tensor) -> Parts:
    """Return the parts of some rows, indices ``(n,)``; their scales are no longer double-quantised."""
    scale = parts.scale if parts.scale_absmax is None else effective_scale(parts)
    tau = parts.tau if parts.tau_absmax is None else effective_tau(parts)
    codes, scale = (stored.index_select(0, rows) for stored in (parts.codes, scale))
    tau = None if tau is None else tau.index_select(0, rows)
    return Parts(codes, scale, None, None, tau, None, *parts[6:])


def product(
    x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, parts: Parts
) -> tuple[Tensor, Tensor | None]:
    """Return ``x W^T + bias + (x a^T) b^T`` and ``x a^T``, (tokens, r).

    All are of one dtype. Not differentiable: the two operations that are share it and its gradients
    (:func:`block_linear`, :func:`irq_export.block_iec.block_iec_linear`).
    """
    weight = decode(parts, x.dtype)
    if a is None or b is None:
        return F.linear(x, weight, bias), None
    # the large product is added to the small one, so that the sum is rounded once
    rows = x.reshape(-1, x.shape[-1])
    hidden = rows @ a.T
    branch = hidden @ b.T if bias is None else torch.addmm(bias, hidden, b.T)
    return branch.addmm_(rows, weight.T).view(*x.shape[:-1], parts.shape[0]), hidden


def product_gradients(
    grad: Tensor,
    x: Tensor | None,
    hidden: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    parts: Parts,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return those gradients of :func:`product` (x, bias, a, b) that are wanted, else None.

    They are of the dtype of the product, whatever autocast says by now: the forward pass has settled it.
    """
    wants_x, wants_bias, wants_a, wants_b = wanted
    rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
    grad_x = grad_bias = grad_a = grad_b = grad_hidden = None
    with torch.autocast(grad.device.type, enabled=False):
        if b is not None and (wants_x or wants_a):
            grad_hidden = rows @ b  # (tokens, r)
        if wants_x:
            weight = decode(parts, grad.dtype, after=grad)
            branch = None if grad_hidden is None or a is None else grad_hidden @ a
            grad_x = rows @ weight if branch is None else branch.addmm_(rows, weight)
            grad_x = grad_x.view(*grad.shape[:-1], parts.shape[1])
        if wants_bias:
            grad_bias = rows.sum(0)
        if wants_a and grad_hidden is not None and x is not None:
            grad_a = grad_hidden.T @ x.reshape(-1, x.shape[-1])
        if wants_b and hidden is not None:
            grad_b = rows.T @ hidden
    return grad_x, grad_bias, grad_a, grad_b


class _BlockLinear(torch.autograd.Function):
    """``x W^T + bias``; see :func:`block_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
        ctx.save_for_backward(*fields[:6])  # nothing of the size of the input or the weight
        ctx.formats = fields[6:]
        return product(x, bias, None, None, Parts(*fields))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = Parts(*ctx.saved_tensors, *ctx.formats)
        wanted = (*ctx.needs_input_grad[:2], False, False)
        gradients = product_gradients(grad, None, None, None, None, parts, wanted)
        return *gradients[:2], *[None] * len(Parts._fields)


def compute_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a matrix product with ``x`` (cast to ``dtype``): that of autocast, or its own."""
    kind, dtype = x.device.type, dtype or x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def block_linear(x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + bias``, differentiable in x and bias.

    Args:
        x: (..., in); under autocast it is cast to autocast's dtype first, as F.linear does.
        parts: The stored matrix W (out, in).
        bias: (out,), or None.

    Returns:
        (..., out) in the dtype of the product.
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _BlockLinear.apply(x.to(dtype), bias, *parts)  # type: ignore[no-untyped-call, no-any-return]
