"""Adding the elastic connection to A and B, with scaling and cast, in one pass; and its gradients.

An adapter's matrices are small, so what counts here is the number of launches: torch needs five forward and
six backward for each matrix, and here A and B share one each way.
"""

# mypy: disable-error-code="import-not-found,no-untyped-def,no-untyped-call,untyped-decorator,misc"
# ruff: noqa: N803 - constants of a Triton kernel are written in capitals

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from irq_export.elastic import Elastic

__all__ = ["elastic_gradients", "elastic_weights"]

_ELEMENTS = 1024  # a program


@triton.jit
def _entry(place, columns, tall, wide):
    """Whether elements of a matrix lie where the elastic matrix is not zero."""
    return (place // columns) // tall == (place % columns) // wide


@triton.jit
def _add(out, weight, beta, value, scaling, count, columns, tall, wide, ELEMENTS: tl.constexpr):
    place = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    w += tl.where(_entry(place, columns, tall, wide), tl.load(beta).to(tl.float32) * value, 0.0)
    tl.store(out + place, (w * scaling).to(out.dtype.element_ty), mask=inside)


# fmt: off
@triton.jit
def _weights_kernel(
    out, weight, beta, value, scaling, count, columns, tall, wide,
    out2, weight2, beta2, value2, scaling2, count2, columns2, tall2, wide2,
    ELEMENTS: tl.constexpr,
):
    """The second axis of the grid chooses the matrix."""
    if tl.program_id(1) == 0:
        _add(out, weight, beta, value, scaling, count, columns, tall, wide, ELEMENTS)
    else:
        _add(out2, weight2, beta2, value2, scaling2, count2, columns2, tall2, wide2, ELEMENTS)


@triton.jit
def _scale(out, sums, grad, value, scaling, count, columns, tall, wide, ELEMENTS: tl.constexpr):
    place = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g * scaling).to(out.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(_entry(place, columns, tall, wide), g, 0.0), 0) * value
    tl.store(sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def _gradients_kernel(
    sums,
    out, grad, value, scaling, count, columns, tall, wide,
    out2, grad2, value2, scaling2, count2, columns2, tall2, wide2,
    ELEMENTS: tl.constexpr,
):
    """The same; a program behind the end of the shorter matrix writes a sum of zero."""
    if tl.program_id(1) == 0:
        _scale(out, sums, grad, value, scaling, count, columns, tall, wide, ELEMENTS)
    else:
        _scale(out2, sums, grad2, value2, scaling2, count2, columns2, tall2, wide2, ELEMENTS)
# fmt: on


def _layout(weight: Tensor) -> tuple[int, int, int, int]:
    """Elements, columns, and the size of a diagonal block, of a matrix."""
    rows, columns = weight.shape
    groups = gcd(rows, columns)
    return weight.numel(), columns, rows // groups, columns // groups


def _programs(matrices: Sequence[Tensor]) -> int:
    return max(-(-matrix.numel() // _ELEMENTS) for matrix in matrices)


def elastic_weights(matrices: Sequence[Elastic], values: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    """Return ``scaling * (weight + beta * value)`` with the sum taken where the elastic matrix is not zero.

    Args:
        matrices: One or two, fp32 or below.
        values: What the elastic matrix of each holds there.
        dtype: Of the results.
    """
    weights = [matrix.weight.contiguous() for matrix in matrices]
    outs = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    sides = [
        (out, weight, matrix.beta, value, matrix.scaling, *_layout(weight))
        for out, weight, matrix, value in zip(outs, weights, matrices, values, strict=True)
    ]
    with torch.cuda.device_of(outs[0]):
        _weights_kernel[(_programs(weights), len(sides))](
            *sides[0], *sides[-1], ELEMENTS=_ELEMENTS, enable_fp_fusion=False
        )
    return outs


def elastic_gradients(
    grads: Sequence[Tensor], scalings: Sequence[float], values: Sequence[float], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return gradients of weight and beta: ``scaling * grad``, and ``value`` times a sum of ``grad``.

    Args:
        grads: One or two, (m, n), of the results of :func:`elastic_weights`.
        scalings: As there.
        values: What the sum over the entries of the elastic matrix is multiplied by.
        dtype: Of the results, that of the weights.

    Returns:
        (m, n) and (1,) of each; sums are taken in fp32, in an order that does not change from run to run.
    """
    grads = [grad.contiguous() for grad in grads]
    outs = [torch.empty_like(grad, dtype=dtype) for grad in grads]
    programs = _programs(grads)
    sums = torch.empty(len(grads), programs, dtype=torch.float32, device=grads[0].device)
    sides = [
        (out, grad, value, scaling, *_layout(grad))
        for out, grad, value, scaling in zip(outs, grads, values, scalings, strict=True)
    ]
    with torch.cuda.device_of(sums):
        _gradients_kernel[(programs, len(sides))](sums, *sides[0], *sides[-1], ELEMENTS=_ELEMENTS)
    totals = sums.sum(1).to(dtype)
    return [(out, totals[i : i + 1]) for i, out in enumerate(outs)]
