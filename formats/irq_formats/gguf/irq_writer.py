"""The irq payload of a GGUF file, writing side (spec/irq-gguf.md; schema in ``irq_payload``).

Pure translation: block specs, arrays and adapter layers become metadata and
:class:`~irq_formats.gguf.writer.TensorSource` objects. Arrays are asked for one at a time, when their turn
comes, and written bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import LoraLayer
from irq_formats.blocks import BlockSpec, part_layout
from irq_formats.gguf.irq_payload import ARCHITECTURE, VERSION, BlockEntry
from irq_formats.gguf.model_keys import IRQ_PREFIX, model_metadata
from irq_formats.gguf.types import BOOL, F64, STR, U32, GgmlType, GgufValue
from irq_formats.gguf.writer import TensorSource
from irq_formats.model import ModelConfig

__all__ = [
    "adapter_header",
    "adapter_metadata",
    "adapter_sources",
    "block_metadata",
    "block_sources",
    "model_header",
]

#: dtype of a stored part to tensor type; bytes are I8, the only byte type of GGUF.
_TYPES = {"uint8": GgmlType.I8, "float16": GgmlType.F16, "float32": GgmlType.F32}


def model_header(config: ModelConfig, base_hash: str) -> dict[str, GgufValue]:
    """Return the keys every irq model starts with."""
    return {
        "general.architecture": STR(ARCHITECTURE),
        "general.type": STR("model"),
        "irq.version": U32(VERSION),
        "irq.base_hash": STR(base_hash),
        **model_metadata(config, IRQ_PREFIX),
    }


def adapter_header() -> dict[str, GgufValue]:
    """Return the keys a separate adapter file starts with."""
    return {
        "general.architecture": STR(ARCHITECTURE),
        "general.type": STR("adapter"),
        "irq.version": U32(VERSION),
    }


def block_metadata(entries: Sequence[BlockEntry]) -> dict[str, GgufValue]:
    """Return the ``irq.blocks.*`` table."""
    specs = [entry.spec for entry in entries]
    return {
        "irq.blocks.name": STR.array([entry.name for entry in entries]),
        "irq.blocks.codebook": STR.array([spec.codebook for spec in specs]),
        "irq.blocks.block_size": U32.array([spec.block_size for spec in specs]),
        "irq.blocks.out": U32.array([entry.shape[0] for entry in entries]),
        "irq.blocks.in": U32.array([entry.shape[1] for entry in entries]),
        "irq.blocks.scale": STR.array([spec.scale for spec in specs]),
        "irq.blocks.tau": STR.array([spec.tau for spec in specs]),
        "irq.blocks.scale_rounding": STR.array([spec.scale_rounding for spec in specs]),
    }


def block_sources(
    name: str, spec: BlockSpec, shape: tuple[int, int], read: Callable[[str], NDArray[np.generic]]
) -> list[TensorSource]:
    """Return the tensors of one block-quantised matrix, in storage order.

    Args:
        name: Stock name without ``.weight``.
        spec: How the parts are read.
        shape: ``(out, in)``.
        read: Returns a part by its name, in the dtype and shape of :func:`part_layout`.
    """

    def load(part: str, dtype: np.dtype[np.generic]) -> Callable[[], NDArray[np.generic]]:
        return lambda: read(part).view(np.int8 if dtype == np.uint8 else dtype)

    return [
        TensorSource(f"{name}.{part}", part_shape, _TYPES[dtype.name], load(part, dtype))
        for part, (dtype, part_shape) in part_layout(spec, shape).items()
    ]


def adapter_metadata(layers: Mapping[str, LoraLayer], base_hash: str | None) -> dict[str, GgufValue]:
    """Return the ``irq.adapter.*`` keys.

    Args:
        layers: By stock name without ``.weight``.
        base_hash: Hash of the base it was trained against, if recorded.
    """
    metadata = {
        "irq.adapter.name": STR.array(list(layers)),
        "irq.adapter.scaling": F64.array([layer.scaling for layer in layers.values()]),
        "irq.adapter.iec": BOOL.array([layer.has_iec for layer in layers.values()]),
    }
    return metadata if base_hash is None else {**metadata, "irq.adapter.base_hash": STR(base_hash)}


def adapter_sources(name: str, layer: LoraLayer) -> list[TensorSource]:
    """Return the tensors of one adapted matrix; ``name`` without ``.weight``."""
    arrays = {"lora_a": layer.lora_a, "lora_b": layer.lora_b}
    if layer.has_iec:
        arrays["lora_beta"] = np.array([layer.beta1, layer.beta2])
    return [_f32_source(f"{name}.{part}", array) for part, array in arrays.items()]


def _f32_source(name: str, array: NDArray[np.floating]) -> TensorSource:
    return TensorSource(name, array.shape, GgmlType.F32, lambda: np.asarray(array, np.float32))
