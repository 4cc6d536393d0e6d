"""The elastic connection of IEC (IR-QLoRA, arXiv 2402.05445, equation 16), on features and as a matrix.

On features it adds to every element of a group the mean of a group of the input. It is linear, so with its
weight beta fixed it can be added to the low-rank matrix it runs beside: :func:`elastic_weight`.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from irq_export import kernels

__all__ = ["add_elastic", "elastic_weight"]


def add_elastic(y: Tensor, x: Tensor, beta: Tensor) -> Tensor:
    """Return ``y + beta * elastic(x, m)``.

    Args:
        y: (..., m), what the low-rank projection gave.
        x: (..., n), what went into it.
        beta: (1,), trainable weight of the connection.

    Returns:
        (..., m). With g = gcd(n, m) contiguous groups, every one of the m/g elements of a group of y
        gets beta times the mean of the n/g elements of the same group of x.
    """
    groups = gcd(x.shape[-1], y.shape[-1])
    means = x.reshape(*x.shape[:-1], groups, -1).mean(-1, keepdim=True)  # (..., g, 1)
    return (y.reshape(*y.shape[:-1], groups, -1) + beta * means).reshape(y.shape)


class _ElasticWeight(torch.autograd.Function):
    """See :func:`elastic_weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, beta: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.scaling = weight.dtype, scaling
        value = _elastic_value(weight)
        if _on_gpu(weight, beta, dtype):
            from irq_export.kernels.elastic import elastic_weight as elastic_on_gpu

            return elastic_on_gpu(weight, beta, value, scaling, dtype)
        total = weight.clone(memory_format=torch.contiguous_format)
        _elastic_entries(total).add_(beta * value)
        return (total * scaling).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value = _elastic_value(grad) * ctx.scaling
        if _on_gpu(grad, grad, ctx.dtype):
            from irq_export.kernels.elastic import elastic_gradients

            grad_weight, total = elastic_gradients(grad, ctx.scaling, ctx.dtype)
        else:
            wide = grad.to(ctx.dtype)
            grad_weight, total = wide * ctx.scaling, _elastic_entries(wide).sum().view(1)
        return grad_weight, total * value, None, None


def _on_gpu(weight: Tensor, beta: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels serve; a compiler fuses the torch code itself."""
    return (
        torch.float64 not in (weight.dtype, beta.dtype, dtype)
        and not torch.compiler.is_compiling()
        and kernels.available(weight.device)
    )


def _elastic_entries(weight: Tensor) -> Tensor:
    """A view of the entries (m/g, n/g, g) of a weight (m, n) that the elastic matrix is not zero at."""
    rows, columns = weight.shape
    groups = gcd(rows, columns)
    return weight.reshape(groups, rows // groups, groups, columns // groups).diagonal(dim1=0, dim2=2)


def _elastic_value(weight: Tensor) -> float:
    """What the elastic matrix of the shape of a weight (m, n) holds there: one over the n/g of a mean."""
    rows, columns = weight.shape
    return gcd(rows, columns) / columns


def elastic_weight(
    weight: Tensor, beta: Tensor, *, scaling: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``scaling * (weight + beta * E)``: a product with it is a product with an elastic connection.

    Args:
        weight: (m, n).
        beta: (1,).
        scaling: Multiplier of the result.
        dtype: Of the result, which is rounded to it last; that of the weight if None.

    Returns:
        (m, n), with which ``F.linear(x, result)`` is ``scaling * add_elastic(F.linear(x, weight), x, beta)``:
        E (equation 16) maps x to the repeated means of its groups. Differentiable in weight and beta; costs
        O(m n), whatever the number of tokens.
    """
    return _ElasticWeight.apply(weight, beta, scaling, dtype or weight.dtype)  # type: ignore[no-untyped-call, no-any-return]
