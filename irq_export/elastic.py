"""The elastic connection of IEC (IR-QLoRA, arXiv 2402.05445, equation 16), on features and as a matrix.

On features it adds to every element of a group the mean of a group of the input. It is linear, so with its
weight beta fixed it can be added to the low-rank matrix it runs beside: :func:`elastic_weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irq_export import kernels

__all__ = ["Elastic", "add_elastic", "elastic_gradients", "elastic_weight", "elastic_weights"]


class Elastic(NamedTuple):
    """A low-rank matrix with its elastic connection, which stands for ``scaling * (weight + beta * E)``.

    Attributes:
        weight: (m, n).
        beta: (1,).
        scaling: Multiplier of both.
    """

    weight: Tensor
    beta: Tensor
    scaling: float


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
    means = _grouped(x, groups).mean(-1, keepdim=True)  # (..., g, 1)
    return (_grouped(y, groups) + beta * means).reshape(y.shape)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def elastic_weights(matrices: Sequence[Elastic], dtype: torch.dtype) -> list[Tensor]:
    """Return what one or two matrices stand for, summed in float32, rounded last; not differentiable."""
    values = [_elastic_value(matrix.weight) for matrix in matrices]
    if _on_gpu(dtype, *(tensor for matrix in matrices for tensor in matrix[:2])):
        from irq_export.kernels.elastic import elastic_weights as elastic_on_gpu

        return elastic_on_gpu(matrices, values, dtype)
    results = []
    for (weight, beta, scaling), value in zip(matrices, values, strict=True):
        total = weight.to(_wide(weight.dtype), memory_format=torch.contiguous_format, copy=True)
        _elastic_entries(total).add_(beta.to(total.dtype) * value)
        results.append((total * scaling).to(dtype))
    return results


def elastic_gradients(
    grads: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return the gradients of weight and beta, in their dtype, for those of :func:`elastic_weights`."""
    values = [_elastic_value(grad) * scaling for grad, scaling in zip(grads, scalings, strict=True)]
    if _on_gpu(dtype, *grads):
        from irq_export.kernels.elastic import elastic_gradients as gradients_on_gpu

        return gradients_on_gpu(grads, scalings, values, dtype)
    results = []
    for grad, scaling, value in zip(grads, scalings, values, strict=True):
        wide = grad.to(_wide(dtype))
        grad_beta = _elastic_entries(wide).sum().view(1) * value
        results.append(((wide * scaling).to(dtype), grad_beta.to(dtype)))
    return results


class _ElasticWeight(torch.autograd.Function):
    """See :func:`elastic_weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, beta: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.scaling = weight.dtype, scaling
        return elastic_weights([Elastic(weight, beta, scaling)], dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = elastic_gradients([grad], [ctx.scaling], ctx.dtype)
        return *gradients, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, as the kernels do: float32, or float64 where that is asked for."""
    return torch.promote_types(dtype, torch.float32)


def _on_gpu(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether the Triton kernels serve; a compiler fuses the torch code itself."""
    return (
        torch.float64 not in (dtype, *(tensor.dtype for tensor in tensors))
        and not torch.compiler.is_compiling()
        and kernels.available(tensors[0].device)
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
