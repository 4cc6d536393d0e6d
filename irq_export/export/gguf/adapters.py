"""The adapter of an export: found, checked against its base, and put into the form a profile needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import (
    Adapter,
    LoraLayer,
    check_base_hash,
    fold,
    fold_adapter_layers,
    tau_extra_rank,
)
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UsageError
from irq_formats.gguf.irq_check import check_adapter_fits
from irq_formats.names import hf_to_gguf
from irq_formats.peft_adapter import read_peft_adapter

__all__ = ["NO_ADAPTER", "export_adapter", "lora_pair"]

#: No layers at all.
NO_ADAPTER = Adapter({})

F32 = NDArray[np.float32]


def export_adapter(checkpoint: Checkpoint, adapter_dir: str | Path | None, mode: str) -> Adapter:
    """Return the adapter to export, in the order of the model, folded if ``mode`` is ``fold``.

    Args:
        checkpoint: The base.
        adapter_dir: A PEFT directory; None takes the checkpoint's own, if it has one.
        mode: ``keep``, ``fold``, ``merge`` or ``drop``.

    Raises:
        WrongBase: The adapter was trained against another quantised base.
        UsageError: There is nothing to fold.
        MalformedFile: The adapter does not fit the model.
    """
    directory = adapter_dir or checkpoint.adapter_dir
    if directory is None:
        if mode == "fold":
            raise UsageError(
                "there is no adapter", where=checkpoint.path, hint="Name one with --adapter-dir DIR"
            )
        return NO_ADAPTER
    adapter = read_peft_adapter(directory)
    check_base_hash(adapter.base_hash, checkpoint.base_hash, directory)
    check_adapter_fits(
        {hf_to_gguf(module): layer for module, layer in adapter.layers.items()}, checkpoint.model, directory
    )
    order = [name.removesuffix(".weight") for name in [*checkpoint.blocks, *checkpoint.plain]]
    layers = {module: adapter.layers[module] for module in order if module in adapter.layers}
    ordered = replace(adapter, layers=layers)
    return fold_adapter_layers(ordered) if mode == "fold" else ordered


def lora_pair(layer: LoraLayer | None, tau: F32 | None, block_size: int) -> tuple[F32, F32]:
    """Return A and B of llama.cpp's LoRA at scale 1: the adapter and, as extra rank, tau.

    Args:
        layer: The adapter of the linear layer, or None.
        tau: Offsets, float32 ``(out, nb)``, or None.
        block_size: Inputs per block.

    Returns:
        ``lora_a`` float32 ``(r + nb, in)``, ``lora_b`` float32 ``(out, r + nb)``.

    Raises:
        UsageError: Both are None, or their shapes differ.
    """
    if tau is not None:
        return tau_extra_rank(layer, tau, block_size)
    if layer is None:
        raise UsageError("neither an adapter nor offsets")
    folded = fold(layer)
    scaled = (folded.scaling * folded.lora_b.astype(np.float64)).astype(np.float32)
    return folded.lora_a.astype(np.float32, copy=False), scaled
