"""A block-quantised linear layer with its IEC branch as one operation.

The same arithmetic as :func:`irq_export.elastic.elastic_weight` of A and of B, then
:func:`irq_export.block_linear.block_linear`; as one operation it costs fewer launches and less of Python,
which is what a small layer on a GPU waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from irq_export.block_linear import Parts, product, product_gradients
from irq_export.elastic import Elastic, elastic_gradients, elastic_weights

__all__ = ["block_iec_linear"]


class _BlockIecLinear(torch.autograd.Function):
    """See :func:`block_iec_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        scaling: float,
        *fields: Any,
    ) -> Tensor:
        a, b = elastic_weights([Elastic(lora_a, beta1, 1.0), Elastic(lora_b, beta2, scaling)], x.dtype)
        y, hidden = product(x, bias, a, b, Parts(*fields))
        ctx.save_for_backward(x, hidden, a, b, *fields[:6])
        ctx.settings = scaling, lora_a.dtype, fields[6:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, *stored = ctx.saved_tensors
        scaling, dtype, formats = ctx.settings
        wants_x, wants_bias, *wants = ctx.needs_input_grad[:6]
        trained = any(wants)
        grad_x, grad_bias, grad_a, grad_b = product_gradients(
            grad, x, hidden, a, b, Parts(*stored, *formats), (wants_x, wants_bias, trained, trained)
        )
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if grad_a is not None and grad_b is not None:
            ours = elastic_gradients([grad_a, grad_b], [1.0, scaling], dtype)
            gradients = ours[0][0], ours[1][0], ours[0][1], ours[1][1]
        return grad_x, grad_bias, *gradients, None, *[None] * len(Parts._fields)


def block_iec_linear(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``x W^T + bias + (x a^T) b^T``, differentiable (once) in all but the parts.

    Args:
        x: (..., in).
        parts: The stored matrix W (out, in).
        bias: (out,), or None.
        lora_a: A, (r, in); a is A with its elastic connection.
        lora_b: B, (out, r); b is B with its elastic connection, times the scaling.
        beta1: Weight of the elastic connection of A, (1,).
        beta2: The same of B.
        scaling: Multiplier of the branch.
        dtype: Of the products.

    Returns:
        (..., out) in that dtype.
    """
    bias = None if bias is None else bias.to(dtype)
    return _BlockIecLinear.apply(  # type: ignore[no-untyped-call, no-any-return]
        x.to(dtype), bias, lora_a, lora_b, beta1, beta2, scaling, *parts
    )
