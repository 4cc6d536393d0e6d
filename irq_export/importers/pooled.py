"""QA-LoRA's pooled adapters, folded into the offsets of a checkpoint.

QA-LoRA (arXiv 2309.14717) feeds A with one feature a group of g inputs, their mean (its own code) or their
sum (the released IR-QLoRA code for integers). Where a group is one of our blocks, or several, the whole
branch is an offset a block::

    tau'[o, b] = tau[o, b] + scaling * (B' A')[o, group of b] / (g if pooled by mean else 1)

In real arithmetic that is exact. Here the sum is taken in float64 and rounded once to float32, so each
offset is within half a unit in the last place of the exact one; codes and scales do not change, and no
adapter is left. The elastic connection over B always folds; that over A only if its groups of in / r
inputs are whole pooling groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import Adapter, LoraLayer, fold
from irq_formats.blocks import BlockTensor
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UnsupportedModel, UsageError, WrongBase

__all__ = ["POOLINGS", "fold_pooled", "is_pooled", "pooled_offsets"]

#: How a group of inputs becomes one feature.
POOLINGS = ("mean", "sum")
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def is_pooled(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether every A reads fewer features than its layer has inputs, by a whole factor."""
    return all(
        module in shapes and shapes[module][1] % width == 0 and width < shapes[module][1]
        for module, width in ((name, layer.lora_a.shape[1]) for name, layer in adapter.layers.items())
    )


def pooled_offsets(
    layer: LoraLayer, shape: tuple[int, int], block_size: int, pooling: str, where: str
) -> F64:
    """Return what a pooled branch adds to each block's offset.

    Args:
        layer: A ``(r, in / g)``, B ``(out, r)``.
        shape: ``(out, in)`` of the base.
        block_size: Of the base.
        pooling: ``mean`` or ``sum``.
        where: Module, for messages.

    Returns:
        float64 ``(out, nb)``.

    Raises:
        UnsupportedModel: A pooling group is no whole number of blocks, or the elastic connection over A
            does not follow the groups.
        WrongBase: The branch does not fit the layer.
    """
    out, width = shape
    features = layer.lora_a.shape[1]
    if layer.lora_b.shape[0] != out or width % features:
        raise WrongBase(
            "the pooled adapter does not fit",
            where=where,
            expected=shape,
            got=(layer.lora_b.shape[0], features),
        )
    group = width // features
    if group % block_size:
        raise UnsupportedModel(
            "a pooling group is not a whole number of blocks",
            where=where,
            expected=f"groups of a multiple of {block_size} inputs",
            got=group,
            hint="Quantise the base with the adapter's group size: --block-size 32",
        )
    per_input = np.repeat(layer.lora_a.astype(np.float64), group, axis=1)  # (r, in): x A^T from raw inputs
    if pooling == "mean":
        per_input /= group
    whole = fold(replace(layer, lora_a=per_input, lora_b=layer.lora_b.astype(np.float64)))
    groups = whole.lora_a.reshape(layer.rank, -1, group)
    if (groups != groups[..., :1]).any():
        raise UnsupportedModel(
            "the elastic connection over A does not follow the pooling groups",
            where=where,
            expected=f"in / r a multiple of {group}",
            got=f"{width} / {layer.rank}",
            hint="Keep this adapter as a branch: it has no exact place in the offsets",
        )
    per_group: F64 = layer.scaling * (whole.lora_b @ groups[..., 0])  # (out, in / g)
    return np.repeat(per_group, group // block_size, axis=1)


def fold_pooled(checkpoint: Checkpoint, adapter: Adapter, pooling: str) -> Callable[[str], BlockTensor]:
    """Return a reader of the checkpoint's block tensors with the adapter in their offsets.

    Raises:
        UsageError: Unknown pooling.
        WrongBase: The adapter names a layer that is not quantised.
    """
    if pooling not in POOLINGS:
        raise UsageError(
            "how the adapter pools its inputs is not written in its files",
            expected="--pooling mean (QA-LoRA's own code) or sum (the released IR-QLoRA integer code)",
            got=pooling,
        )
    if missing := sorted(set(adapter.layers) - set(checkpoint.blocks)):
        raise WrongBase("the base has no such quantised layer", where=checkpoint.path, got=missing[0])

    def read(module: str) -> BlockTensor:
        tensor = checkpoint.block_tensor(module)
        if module not in adapter.layers:
            return tensor
        delta = pooled_offsets(adapter.layers[module], tensor.shape, tensor.spec.block_size, pooling, module)
        tau: F32 = (tensor.tau().astype(np.float64) + delta).astype(np.float32)
        kept = {name: part for name, part in tensor.parts.items() if not name.startswith("tau")}
        return BlockTensor(replace(tensor.spec, tau="f32"), tensor.shape, {**kept, "tau": tau})

    return read
