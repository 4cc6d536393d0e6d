"""Tensors on their way from a checkpoint into a GGUF file.

An :class:`ExportTensor` knows where its bytes come from, so that a plan can prove that every source
tensor is used exactly once, and how much memory making it takes. Nothing is read before the writer
asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import Adapter
from irq_formats.blocks import BlockTensor, part_layout
from irq_formats.checkpoint import Checkpoint
from irq_formats.gguf import GgmlType, TensorSource
from irq_formats.gguf.repack import interleave_heads
from irq_formats.model import ModelConfig
from irq_formats.names import hf_to_gguf

__all__ = [
    "Array",
    "ExportTensor",
    "adapter_origins",
    "block_origins",
    "float_tensor",
    "is_interleaved",
    "read_tau",
    "row_order",
    "source_tensors",
]

Array = NDArray[np.generic]

_INTERLEAVED = (".attn_q.", ".attn_k.")


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of the output.

    Attributes:
        source: Name, shape, type and loader.
        origins: Checkpoint and adapter tensors it uses up.
        work_bytes: Memory needed while it is made, in bytes.
        quantized_bytes: Bytes that store a block-quantised matrix, for bits per weight.
    """

    source: TensorSource
    origins: tuple[str, ...]
    work_bytes: int
    quantized_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.source.type.nbytes(self.source.shape)


def float_tensor(
    checkpoint: Checkpoint,
    hf_name: str,
    *,
    kind: GgmlType | None = None,
    order: Callable[[Array], Array] | None = None,
) -> ExportTensor:
    """Return a floating-point tensor under its stock name.

    Args:
        checkpoint: Where it is.
        hf_name: Its Hugging Face name.
        kind: F32 to widen it, exactly; None keeps its own dtype.
        order: Row order of the output, for stock llama files.
    """
    ref = checkpoint.plain[hf_name]
    kind = GgmlType[ref.dtype] if kind is None else kind
    read = checkpoint.plain_f32 if kind is GgmlType.F32 else checkpoint.plain_raw
    put = order or _as_it_is

    def load() -> Array:
        return put(read(hf_name))

    shape = tuple(ref.shape)
    source = TensorSource(hf_to_gguf(hf_name), shape, kind, load)
    return ExportTensor(source, (hf_name,), kind.nbytes(shape) + ref.nbytes)


def _as_it_is(array: Array) -> Array:
    return array


def is_interleaved(config: ModelConfig, name: str) -> bool:
    """Tell whether a stock file holds the rows of this tensor in another order than Hugging Face.

    llama.cpp rotates neighbouring rows of q and k in its ``llama`` architecture, Hugging Face rows half a
    head apart; the other architectures keep Hugging Face's order.

    Args:
        config: The model.
        name: Stock tensor name.
    """
    return config.architecture == "llama" and any(part in name for part in _INTERLEAVED)


def row_order(config: ModelConfig, name: str) -> Callable[[Array], Array]:
    """Return what puts the rows of a tensor into the order of a stock file (see :func:`is_interleaved`)."""
    if is_interleaved(config, name):
        return partial(interleave_heads, head_dim=config.head_dim)
    return _as_it_is


def block_origins(checkpoint: Checkpoint, module: str, *, tau: bool | None = None) -> tuple[str, ...]:
    """Return the checkpoint tensors of a quantised matrix: all, or only (not) those of tau."""
    entry = checkpoint.blocks[module]
    parts = part_layout(entry.spec, entry.shape)
    return tuple(f"{module}.{part}" for part in parts if tau is None or part.startswith("tau") == tau)


def adapter_origins(adapter: Adapter, module: str) -> tuple[str, ...]:
    """Return the adapter tensors of a linear layer; none if it has none."""
    layer = adapter.layers.get(module)
    if layer is None:
        return ()
    parts = ("lora_A", "lora_B", "beta") if layer.has_iec else ("lora_A", "lora_B")
    return tuple(f"adapter/{module}.{part}" for part in parts)


def source_tensors(checkpoint: Checkpoint, adapter: Adapter) -> Iterable[str]:
    """Yield the name of every tensor that an export has to use or skip."""
    yield from checkpoint.plain
    for module in checkpoint.blocks:
        yield from block_origins(checkpoint, module)
    for module in adapter.layers:
        yield from adapter_origins(adapter, module)


def read_tau(checkpoint: Checkpoint, module: str) -> NDArray[np.float32] | None:
    """Read the block offsets of a matrix alone, float32 ``(out, nb)``; None if it has none."""
    entry = checkpoint.blocks[module]
    if entry.spec.tau == "none":
        return None
    layout = part_layout(entry.spec, entry.shape)
    parts = {part: checkpoint.tensors.read(f"{module}.{part}") for part in layout if part.startswith("tau")}
    return BlockTensor(entry.spec, entry.shape, parts).tau()
