"""Adding the elastic connection to A or B, with scaling and cast, in one pass; and its gradients.

An adapter's matrices are small, so what counts here is the number of launches: torch needs five forward and
six backward for each.
"""

# mypy: disable-error-code="import-not-found,no-untyped-def,no-untyped-call,untyped-decorator,misc"
# ruff: noqa: N803 - constants of a Triton kernel are written in capitals

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["elastic_gradients", "elastic_weight"]

_ELEMENTS = 1024  # a program


@triton.jit
def _entry(place, columns, tall, wide):
    """Whether elements of a matrix lie where the elastic matrix is not zero."""
    return (place // columns) // tall == (place % columns) // wide


@triton.jit
def _weight_kernel(out, weight, beta, value, scaling, count, columns, tall, wide, ELEMENTS: tl.constexpr):
    place = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    w += tl.where(_entry(place, columns, tall, wide), tl.load(beta).to(tl.float32) * value, 0.0)
    tl.store(out + place, (w * scaling).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(out, sums, grad, scaling, count, columns, tall, wide, ELEMENTS: tl.constexpr):
    place = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g * scaling).to(out.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(_entry(place, columns, tall, wide), g, 0.0), 0))


def _layout(weight: Tensor) -> tuple[int, int, int, int]:
    """Elements, columns, and the size of a diagonal block, of a matrix."""
    rows, columns = weight.shape
    groups = gcd(rows, columns)
    return weight.numel(), columns, rows // groups, columns // groups


def elastic_weight(weight: Tensor, beta: Tensor, value: float, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``scaling * (weight + beta * value)`` with the sum taken where the elastic matrix is not zero.

    Args:
        weight: (m, n), fp32 or below.
        beta: (1,).
        value: What the elastic matrix holds there.
        scaling: Multiplier.
        dtype: Of the result.
    """
    weight = weight.contiguous()
    out = torch.empty_like(weight, dtype=dtype)
    layout = _layout(weight)
    with torch.cuda.device_of(out):
        _weight_kernel[(triton.cdiv(layout[0], _ELEMENTS),)](
            out, weight, beta, value, scaling, *layout, ELEMENTS=_ELEMENTS, enable_fp_fusion=False
        )
    return out


def elastic_gradients(grad: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradient of the weight, ``scaling * grad``, and the sum of ``grad`` over those entries.

    Args:
        grad: (m, n), of the result of :func:`elastic_weight`.
        scaling: As there.
        dtype: Of both results, that of the weight.

    Returns:
        (m, n) and (1,); the sum is taken in fp32, in an order that does not change from run to run.
    """
    grad = grad.contiguous()
    out = torch.empty_like(grad, dtype=dtype)
    layout = _layout(grad)
    programs = triton.cdiv(layout[0], _ELEMENTS)
    sums = torch.empty(programs, dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _gradient_kernel[(programs,)](out, sums, grad, scaling, *layout, ELEMENTS=_ELEMENTS)
    return out, sums.sum(0, keepdim=True).to(dtype)
