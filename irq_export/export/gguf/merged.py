"""Matrices as floating point: blocks decoded, the adapter added in float64, one rounding at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from irq_export.export.gguf.tensors import (
    Array,
    ExportTensor,
    adapter_origins,
    block_origins,
    float_tensor,
    row_order,
)
from irq_formats.adapter import Adapter, LoraLayer, fold
from irq_formats.checkpoint import Checkpoint, hf_tensor_shapes
from irq_formats.errors import UnsupportedModel
from irq_formats.gguf import GgmlType, TensorSource
from irq_formats.gguf.repack import repack
from irq_formats.gguf.stock_blocks import BF16, dequantize
from irq_formats.names import hf_to_gguf

__all__ = ["merged_matrix", "merged_tensors", "round_once"]

_CHUNK_ELEMENTS = 1 << 20


def merged_tensors(checkpoint: Checkpoint, adapter: Adapter, kind: GgmlType) -> list[ExportTensor]:
    """Return all tensors of a stock file with the adapter merged, in the order of the model.

    With F32 everything becomes F32, so that stock runtimes round no activations: the re-expansion that
    verification compares with. With F16 and BF16 the matrices do; what was not quantised keeps its
    dtype (vectors become F32, as llama.cpp wants them), and int8 stays as it is, in Q8_0.

    Args:
        checkpoint: The quantised model.
        adapter: What to merge; no layers for none.
        kind: F32, F16 or BF16.
    """
    tensors = []
    for name in hf_tensor_shapes(checkpoint.model):
        module = name.removesuffix(".weight")
        if module in checkpoint.blocks:
            tensors.append(merged_matrix(checkpoint, adapter, module, kind))
        elif module in adapter.layers:
            tensors.append(_merged_float(checkpoint, adapter, module, kind))
        else:
            vector = len(checkpoint.plain[name].shape) == 1
            own = None if kind is not GgmlType.F32 and not vector else GgmlType.F32
            order = row_order(checkpoint.model, hf_to_gguf(name))
            tensors.append(float_tensor(checkpoint, name, kind=own, order=order))
    return tensors


def merged_matrix(checkpoint: Checkpoint, adapter: Adapter, module: str, kind: GgmlType) -> ExportTensor:
    """Return a quantised matrix decoded, tau included, with its adapter added.

    int8 without an adapter is moved exactly into Q8_0 unless ``kind`` is F32.
    """
    block = checkpoint.blocks[module]
    name = f"{hf_to_gguf(module)}.weight"
    layer = adapter.layers.get(module)
    order = row_order(checkpoint.model, name)
    if block.spec.codebook == "int8" and layer is None and kind is not GgmlType.F32:
        kind = GgmlType.Q8_0

    def load() -> Array:
        tensor = checkpoint.block_tensor(module)
        if kind is GgmlType.Q8_0:
            return order(repack(tensor, kind))
        return order(_merge(tensor.dequantize(), layer, kind, name))

    origins = block_origins(checkpoint, module) + adapter_origins(adapter, module)
    weights = block.shape[0] * block.shape[1]
    nbytes = kind.nbytes(block.shape)
    work_bytes = 5 * weights + 2 * nbytes + 24 * _CHUNK_ELEMENTS
    return ExportTensor(TensorSource(name, block.shape, kind, load), origins, work_bytes, nbytes)


def _merged_float(checkpoint: Checkpoint, adapter: Adapter, module: str, kind: GgmlType) -> ExportTensor:
    """Return a matrix that was not quantised, with its adapter added."""
    layer = adapter.layers[module]
    hf_name = f"{module}.weight"
    name = hf_to_gguf(hf_name)
    order = row_order(checkpoint.model, name)

    def load() -> Array:
        return order(_merge(checkpoint.plain_f32(hf_name), layer, kind, name))

    origins = (hf_name, *adapter_origins(adapter, module))
    work_bytes = 6 * layer.shape[0] * layer.shape[1] + 2 * kind.nbytes(layer.shape) + 24 * _CHUNK_ELEMENTS
    return ExportTensor(TensorSource(name, layer.shape, kind, load), origins, work_bytes)


def _merge(weight: NDArray[np.float32], layer: LoraLayer | None, kind: GgmlType, name: str) -> Array:
    """Return weight + scaling·B'A', summed in float64 and rounded once to ``kind``."""
    if layer is not None:
        layer = fold(
            replace(layer, lora_a=layer.lora_a.astype(np.float64), lora_b=layer.lora_b.astype(np.float64))
        )
    merged = np.empty(weight.shape, kind.dtype)
    for rows in _row_chunks(weight.shape):
        exact = weight[rows].astype(np.float64)
        if layer is not None:
            exact += layer.scaling * (layer.lora_b[rows] @ layer.lora_a)
        merged[rows] = round_once(exact, kind, name)
    return merged


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


def round_once(values: NDArray[np.float64], kind: GgmlType, name: str) -> Array:
    """Round float64 to the nearest F32, F16 or BF16 (as uint16), ties to even, without double rounding.

    Raises:
        UnsupportedModel: A value lies beyond the range of the type.
    """
    rounded: Array
    with np.errstate(over="ignore"):
        is_bf16 = kind is GgmlType.BF16
        rounded = BF16.quantize(_round_to_odd(values)) if is_bf16 else values.astype(kind.dtype)
    if not np.isfinite(dequantize(rounded, kind)).all():
        raise UnsupportedModel(
            f"a merged weight exceeds {kind.name}",
            where=name,
            got=float(np.abs(values).max()),
            hint="Merge to bf16, which has the range of float32",
        )
    return rounded


def _round_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round to float32 so that a further rounding to fewer bits sees what was cut off.

    Toward zero, then the last bit is set if anything was lost (Boldo & Melquiond, 2008).
    """
    nearest = values.astype(np.float32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    bits = nearest.view(np.uint32) - away.astype(np.uint32)
    lost = nearest.astype(np.float64) != values
    odd: NDArray[np.float32] = (bits | lost.astype(np.uint32)).view(np.float32)
    return odd
