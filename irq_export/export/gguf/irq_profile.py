"""Profile irq: the parts of the checkpoint, moved bit for bit into one file (spec/irq-gguf.md).

Rows keep Hugging Face's order, blocks keep their double-quantised scales and offsets, and an adapter is
embedded, written to a file of its own beside the model, or left out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from irq_export.export.gguf.plan import PlannedFile
from irq_export.export.gguf.tensors import Array, ExportTensor, adapter_origins, float_tensor
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import Checkpoint
from irq_formats.gguf import GgufValue
from irq_formats.gguf.irq_payload import BlockEntry
from irq_formats.gguf.irq_writer import (
    adapter_header,
    adapter_metadata,
    adapter_sources,
    block_metadata,
    block_sources,
    model_header,
)
from irq_formats.names import hf_to_gguf

__all__ = ["irq_files"]


def irq_files(
    checkpoint: Checkpoint,
    adapter: Adapter,
    tokenizer: dict[str, GgufValue],
    output: Path,
    *,
    separate_adapter: bool,
) -> tuple[PlannedFile, ...]:
    """Return the files of the irq profile.

    Args:
        checkpoint: The quantised model.
        adapter: Its adapter; no layers for none.
        tokenizer: ``tokenizer.*`` metadata.
        output: Path of the model file; a separate adapter becomes ``STEM.adapter.gguf`` beside it.
        separate_adapter: Whether the adapter gets a file of its own.
    """
    metadata = model_header(checkpoint.model, checkpoint.base_hash)
    entries = [
        BlockEntry(hf_to_gguf(module), block.spec, block.shape) for module, block in checkpoint.blocks.items()
    ]
    metadata |= block_metadata(entries)
    tensors = _model_tensors(checkpoint)
    files = []
    if adapter.layers:
        layers = {hf_to_gguf(module): layer for module, layer in adapter.layers.items()}
        keys = adapter_metadata(layers, adapter.base_hash)
        pairs = [tensor for module in adapter.layers for tensor in _adapter_tensors(adapter, module)]
        if separate_adapter:
            name = f"{output.stem}.adapter.gguf"
            files.append(PlannedFile(name, {**adapter_header(), **keys}, tuple(pairs)))
        else:
            metadata |= keys
            tensors += pairs
    files.append(PlannedFile(output.name, metadata | tokenizer, tuple(tensors)))
    return tuple(files)


def _model_tensors(checkpoint: Checkpoint) -> list[ExportTensor]:
    """Return blocks and plain tensors in the order of the model."""
    tensors = []
    for module, block in checkpoint.blocks.items():
        read = partial(_read_part, checkpoint, module)
        for source in block_sources(hf_to_gguf(module), block.spec, block.shape, read):
            origin = f"{module}.{source.name.rpartition('.')[2]}"
            nbytes = source.type.nbytes(source.shape)
            tensors.append(ExportTensor(source, (origin,), 2 * nbytes, nbytes))
    return tensors + [float_tensor(checkpoint, name) for name in checkpoint.plain]


def _read_part(checkpoint: Checkpoint, module: str, part: str) -> Array:
    return checkpoint.tensors.read(f"{module}.{part}")


def _adapter_tensors(adapter: Adapter, module: str) -> list[ExportTensor]:
    """Return the tensors of one adapted layer; they are in memory already."""
    sources = adapter_sources(hf_to_gguf(module), adapter.layers[module])
    return [
        ExportTensor(source, (origin,), source.type.nbytes(source.shape))
        for source, origin in zip(sources, adapter_origins(adapter, module), strict=True)
    ]
