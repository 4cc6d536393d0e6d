"""A tiny checkpoint and its adapter, as exporters get them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_checkpoints import write_tiny_checkpoint

from irq_formats.adapter import Adapter, random_layer
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.peft_adapter import write_peft_adapter

__all__ = ["GgufSource"]


class GgufSource:
    """A tiny checkpoint with an adapter that has elastic connections."""

    def __init__(self, path: Path, spec: BlockSpec, **options: object) -> None:
        self.path = path / "checkpoint"
        self.adapter_dir = path / "adapter"
        self.tensors = write_tiny_checkpoint(self.path, spec, **options)  # type: ignore[arg-type]
        checkpoint = open_checkpoint(self.path)
        self.model, self.base_hash = checkpoint.model, checkpoint.base_hash
        self.plain = {name: checkpoint.plain_f32(name) for name in checkpoint.plain}
        rng = np.random.default_rng(7)
        modules = [name for name in self.tensors if name.startswith("model.layers")]
        layers = {module: random_layer(self.tensors[module].shape, 8.0, rng) for module in modules}
        self.adapter = Adapter(layers, self.base_hash)
        write_peft_adapter(self.adapter_dir, self.adapter)
