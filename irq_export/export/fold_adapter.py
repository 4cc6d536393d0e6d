"""Turn an IEC adapter into a plain PEFT adapter, exactly.

With the betas fixed the elastic connection is linear, so it folds into A and B at the same rank. With
``tau_from`` the block offsets of the quantised base go along as extra rank: then a base that knows only
codes and scales (stock NF4, for instance) plus a stock LoRA computes what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import (
    LoraLayer,
    check_base_hash,
    fold_adapter_layers,
    tau_extra_rank,
    unify_rank,
)
from irq_formats.atomic import atomic_dir
from irq_formats.checkpoint import Checkpoint, open_checkpoint
from irq_formats.errors import WrongBase
from irq_formats.manifest import write_manifest
from irq_formats.peft_adapter import WITHOUT_TAU, read_peft_adapter, write_peft_adapter

__all__ = ["FoldResult", "add_tau", "fold_adapter"]


@dataclass(frozen=True)
class FoldResult:
    """What :func:`fold_adapter` did.

    Attributes:
        path: The adapter directory that was written.
        layers: Number of adapted layers in it.
        folded: Number of layers whose elastic connection was folded.
        with_tau: Number of layers that carry block offsets as extra rank.
        max_rank: Largest rank of a layer.
        base_checked: Whether the adapter's base hash was compared with the checkpoint's; without a
            recorded hash or a checkpoint there is nothing to compare.
        file_bytes: Size of the adapter's weights.
    """

    path: Path
    layers: int
    folded: int
    with_tau: int
    max_rank: int
    base_checked: bool
    file_bytes: int

    def to_dict(self) -> dict[str, object]:
        """Return the fields for ``--json``."""
        return {**vars(self), "path": str(self.path)}


def fold_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    tau_from: str | Path | None = None,
    uniform_rank: bool = False,
    overwrite: bool = False,
) -> FoldResult:
    """Write the plain PEFT equivalent of an IEC adapter.

    Args:
        adapter_dir: PEFT directory, plain or IEC (see :mod:`irq_formats.peft_adapter`).
        output_dir: New PEFT directory; complete or absent, also after an interruption.
        tau_from: Checkpoint whose block offsets are added as extra rank. The result then belongs on the
            base *without* tau. A layer with tau keeps it bit for bit, its scaling moves into B.
        uniform_rank: Give every layer the same rank and scaling, for runtimes that ignore PEFT's
            ``rank_pattern`` and ``alpha_pattern`` (vLLM, llama.cpp's converter). Matters with
            ``tau_from``, where wider inputs have more blocks; costs zeros in the file.
        overwrite: Replace an existing output directory.

    Raises:
        MalformedFile: The adapter or the checkpoint is broken.
        UnsupportedModel: The adapter is not a (IEC-)LoRA of linear layers.
        WrongBase: The adapter was trained on another base than ``tau_from``.
        OutputExists: ``output_dir`` exists and ``overwrite`` is false.
    """
    adapter = read_peft_adapter(adapter_dir)
    plain = fold_adapter_layers(adapter)
    n_tau = 0
    if tau_from is not None:
        checkpoint = open_checkpoint(tau_from)
        check_base_hash(adapter.base_hash, checkpoint.base_hash, adapter_dir)
        layers, n_tau = _with_tau_of(checkpoint, plain.layers)
        plain = replace(plain, layers=layers, base_hash=checkpoint.base_hash + WITHOUT_TAU)
    if uniform_rank:
        plain = unify_rank(plain)
    target = Path(output_dir)
    with atomic_dir(target, overwrite=overwrite) as partial:
        write_peft_adapter(partial, plain)
        write_manifest(partial, {"folded_from": Path(adapter_dir).name})
    return FoldResult(
        path=target,
        layers=len(plain.layers),
        folded=sum(layer.has_iec for layer in adapter.layers.values()),
        with_tau=n_tau,
        max_rank=max(layer.rank for layer in plain.layers.values()),
        base_checked=tau_from is not None and adapter.base_hash is not None,
        file_bytes=(target / "adapter_model.safetensors").stat().st_size,
    )


def _with_tau_of(checkpoint: Checkpoint, layers: Mapping[str, LoraLayer]) -> tuple[dict[str, LoraLayer], int]:
    """Add the offsets of every quantised module; return the layers and how many have offsets."""
    for module in layers:
        if module not in checkpoint.blocks and f"{module}.weight" not in checkpoint.plain:
            raise WrongBase(
                "the adapter names a layer that the base does not have",
                where=module,
                hint="Use the checkpoint the adapter was trained on.",
            )
    extended = dict(layers)
    n_tau = 0
    for module, entry in checkpoint.blocks.items():
        if entry.spec.tau != "none":
            tau = checkpoint.block_tensor(module).tau()
            extended[module] = add_tau(layers.get(module), tau, entry.spec.block_size, module)
            n_tau += 1
    return extended, n_tau


def add_tau(layer: LoraLayer | None, tau: NDArray[np.float32], block_size: int, module: str) -> LoraLayer:
    """Return the layer with block offsets as extra rank and scaling 1.

    Args:
        layer: The layer's adapter, if it has one.
        tau: Offsets, (out, in / block_size), float32.
        block_size: Input elements per block.
        module: Named in the error.

    Raises:
        WrongBase: The adapter has another shape than the base.
    """
    shape = (tau.shape[0], tau.shape[1] * block_size)
    if layer is not None and layer.shape != shape:
        raise WrongBase(
            "the adapter does not fit the base",
            where=module,
            expected=f"(out, in) = {shape}",
            got=layer.shape,
            hint="Use the checkpoint the adapter was trained on.",
        )
    lora_a, lora_b = tau_extra_rank(layer, tau, block_size)
    return LoraLayer(lora_a, lora_b)
