"""GGUF files of torch models, written plainly: what the exporter must agree with, not the exporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from irq_formats.adapter import LoraLayer
from irq_formats.blocks import BlockSpec, BlockTensor, encode
from irq_formats.gguf import (
    BOOL,
    F32,
    F64,
    STR,
    U32,
    GgmlType,
    GgufValue,
    TensorSource,
    write_gguf,
)
from irq_formats.gguf.model_keys import IRQ_PREFIX, model_metadata
from irq_formats.model import ModelConfig
from irq_formats.names import gguf_to_hf, hf_to_gguf, linear_names, tensor_shapes
from irq_formats.rope import rope_factors

__all__ = [
    "block_tensors",
    "irq_parts",
    "model_config",
    "state_f32",
    "write_irq",
    "write_irq_adapter",
    "write_stock",
    "write_stock_adapter",
]

Array = NDArray[np.generic]
BASE_HASH = "ab" * 32
_TYPES = {"uint8": GgmlType.I8, "float16": GgmlType.F16, "float32": GgmlType.F32}


def model_config(model: PreTrainedModel) -> ModelConfig:
    return ModelConfig.from_hf(model.config.to_dict())


def state_f32(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """Stock GGUF name to float32 array, rows in Hugging Face order."""
    state = model.state_dict()
    return {
        name: state[gguf_to_hf(name)].detach().float().numpy() for name in tensor_shapes(model_config(model))
    }


def source(name: str, array: Array) -> TensorSource:
    stored = array.view(np.int8) if array.dtype == np.uint8 else array
    return TensorSource(name, array.shape, _TYPES[array.dtype.name], lambda: stored)


def permute(weight: Array, heads: int) -> Array:
    """Rows of q or k in the order of interleaved pairs: (heads, 2, d/2) to (heads, d/2, 2)."""
    shape = weight.shape
    return weight.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_stock(
    path: Path,
    model: PreTrainedModel,
    change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]] = lambda name, array: array,
    metadata: Mapping[str, GgufValue] | None = None,
) -> None:
    """Write an F32 stock file; ``change`` may replace a tensor by stock name."""
    config = model_config(model)
    sources = []
    for name, array in state_f32(model).items():
        values = change(name, array)
        if config.architecture == "llama" and ".attn_q." in name:
            values = permute(values, config.num_attention_heads)
        if config.architecture == "llama" and ".attn_k." in name:
            values = permute(values, config.num_key_value_heads)
        sources.append(source(name, values))
    if (factors := rope_factors(config)) is not None:
        sources.append(source("rope_freqs.weight", factors))
    header = {
        "general.architecture": STR(config.architecture),
        **model_metadata(config, config.architecture),
        **(metadata or {}),
    }
    write_gguf(path, header, sources)


def write_stock_adapter(
    path: Path, architecture: str, pairs: Mapping[str, tuple[Array, Array]], alpha: float
) -> None:
    """Write a llama.cpp LoRA file; ``pairs`` by stock name without ``.weight``."""
    sources = [
        source(f"{name}.weight.lora_{letter}", part)
        for name, pair in pairs.items()
        for letter, part in zip("ab", pair, strict=True)
    ]
    header = {
        "general.architecture": STR(architecture),
        "general.type": STR("adapter"),
        "adapter.type": STR("lora"),
        "adapter.lora.alpha": F32(alpha),
    }
    write_gguf(path, header, sources)


def block_tensors(model: PreTrainedModel, spec: BlockSpec) -> dict[str, BlockTensor]:
    """Quantise every linear by absmax around each block's mean: HF module name to blocks."""
    state = model.state_dict()
    blocks = {}
    for module in linear_names(model_config(model)):
        weight = state[f"{module}.weight"].float().numpy()
        grouped = weight.reshape(weight.shape[0], -1, spec.block_size)
        tau = grouped.mean(axis=2)
        scale = np.abs(grouped - tau[..., None]).max(axis=2)
        blocks[module] = encode(weight, scale, tau, spec)
    return blocks


def irq_parts(
    model: PreTrainedModel,
    blocks: Mapping[str, BlockTensor],
    adapter: Mapping[str, LoraLayer] | None = None,
) -> tuple[dict[str, GgufValue], list[TensorSource]]:
    """Metadata and tensors of an irq file; blocks and adapter by HF module name."""
    config = model_config(model)
    table = {hf_to_gguf(module): tensor for module, tensor in blocks.items()}
    specs = [tensor.spec for tensor in table.values()]
    metadata = {
        "general.architecture": STR("irq"),
        "general.type": STR("model"),
        "irq.version": U32(1),
        "irq.base_hash": STR(BASE_HASH),
        **model_metadata(config, IRQ_PREFIX),
        "irq.blocks.name": STR.array(list(table)),
        "irq.blocks.codebook": STR.array([spec.codebook for spec in specs]),
        "irq.blocks.block_size": U32.array([spec.block_size for spec in specs]),
        "irq.blocks.out": U32.array([tensor.shape[0] for tensor in table.values()]),
        "irq.blocks.in": U32.array([tensor.shape[1] for tensor in table.values()]),
        "irq.blocks.scale": STR.array([spec.scale for spec in specs]),
        "irq.blocks.tau": STR.array([spec.tau for spec in specs]),
        "irq.blocks.scale_rounding": STR.array([spec.scale_rounding for spec in specs]),
    }
    sources = [
        source(f"{name}.{part}", array)
        for name, tensor in table.items()
        for part, array in tensor.parts.items()
    ]
    sources += [
        source(name, array)
        for name, array in state_f32(model).items()
        if name.removesuffix(".weight") not in table
    ]
    if adapter is not None:
        keys, tensors = adapter_parts(adapter)
        metadata |= keys
        sources += tensors
    return metadata, sources


def adapter_parts(
    adapter: Mapping[str, LoraLayer],
) -> tuple[dict[str, GgufValue], list[TensorSource]]:
    layers = {hf_to_gguf(module): layer for module, layer in adapter.items()}
    metadata = {
        "irq.adapter.name": STR.array(list(layers)),
        "irq.adapter.scaling": F64.array([layer.scaling for layer in layers.values()]),
        "irq.adapter.iec": BOOL.array([layer.has_iec for layer in layers.values()]),
        "irq.adapter.base_hash": STR(BASE_HASH),
    }
    sources = []
    for name, layer in layers.items():
        sources += [source(f"{name}.lora_a", layer.lora_a), source(f"{name}.lora_b", layer.lora_b)]
        if layer.has_iec:
            beta = np.array([layer.beta1, layer.beta2], np.float32)
            sources.append(source(f"{name}.lora_beta", beta))
    return metadata, sources


def write_irq(
    path: Path,
    model: PreTrainedModel,
    blocks: Mapping[str, BlockTensor],
    adapter: Mapping[str, LoraLayer] | None = None,
) -> None:
    write_gguf(path, *irq_parts(model, blocks, adapter))


def write_irq_adapter(path: Path, adapter: Mapping[str, LoraLayer], base_hash: str) -> None:
    metadata, sources = adapter_parts(adapter)
    header = {
        "general.architecture": STR("irq"),
        "general.type": STR("adapter"),
        "irq.version": U32(1),
    }
    write_gguf(path, {**header, **metadata, "irq.adapter.base_hash": STR(base_hash)}, sources)
