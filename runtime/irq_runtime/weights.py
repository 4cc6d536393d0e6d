"""Weights by stock GGUF name, decoded when they are first asked for.

Files of three kinds end here: irq models (blocks, plain tensors, an embedded or separate adapter with
its elastic connections), stock models in any type the reader decodes, and stock LoRA adapters, which
in our pairs carry tau as extra rank. A name means the same in all of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from irq_formats.adapter import LoraLayer, fold
from irq_formats.blocks import BlockTensor
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.fields import Fields
from irq_formats.gguf.irq_check import check_adapter_fits, check_no_strangers, plain_tensors
from irq_formats.gguf.irq_payload import (
    ARCHITECTURE,
    check_base,
    check_header,
    payload_names,
    read_adapter,
    read_blocks,
)
from irq_formats.gguf.model_keys import IRQ_PREFIX, read_model
from irq_formats.gguf.pair import check_pair
from irq_formats.gguf.reader import GgufFile, open_gguf
from irq_formats.model import ModelConfig
from irq_formats.names import tensor_shapes
from irq_formats.rope import inverse_frequencies

__all__ = ["Weights", "open_weights"]

F32 = NDArray[np.float32]
FloatArray = NDArray[np.floating]

_CACHE_BYTES = 4 << 30
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Source:
    """What a file gives.

    Attributes:
        config: The model.
        loaders: Stock tensor name to a function that reads the tensor, float32; folded LoRA matrices,
            float64, are among them.
        adapter: Name without ``.weight`` to layer; scaling includes the user's.
        frequencies: float32 ``(head_dim / 2,)``, radians per position.
    """

    config: ModelConfig
    loaders: Mapping[str, Callable[[], FloatArray]]
    adapter: Mapping[str, LoraLayer]
    frequencies: F32


class Weights:
    """The tensors of a model in a working dtype, least recently used ones dropped over a budget.

    Attributes:
        config: The model.
        frequencies: float32 ``(head_dim / 2,)``, radians per position.
    """

    def __init__(self, source: Source, cache_bytes: int = _CACHE_BYTES) -> None:
        self.config = source.config
        self.frequencies = source.frequencies
        self._source = source
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[tuple[str, np.dtype[np.generic]], FloatArray] = OrderedDict()
        self._cached_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._source.loaders

    @property
    def cached_tensors(self) -> int:
        """Decoded tensors held."""
        return len(self._cached)

    def tensor(self, name: str, dtype: DTypeLike) -> FloatArray:
        """Return a tensor by stock name, such as ``blk.0.attn_q.weight``, in numpy's shape."""
        key = (name, np.dtype(dtype))
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        array: FloatArray = self._source.loaders[name]().astype(dtype, copy=False)
        self._cached[key] = array
        self._cached_bytes += array.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cached) > 1:
            self._cached_bytes -= self._cached.popitem(last=False)[1].nbytes
        return array

    def lora(self, name: str, dtype: DTypeLike) -> LoraLayer | None:
        """Return the adapter of a linear layer with its elastic connections folded in, or None."""
        layer = self._source.adapter.get(name)
        if layer is None:
            return None
        a, b = (self.tensor(f"{name}.{part}", dtype) for part in ("lora_a", "lora_b"))
        return LoraLayer(a, b, scaling=layer.scaling)


def open_weights(
    path: str | Path,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    *,
    cache_bytes: int = _CACHE_BYTES,
) -> Weights:
    """Open a model file and, if given, an adapter file of the same profile.

    Args:
        path: GGUF model.
        adapter: GGUF adapter; None uses what an irq model embeds.
        adapter_scale: Multiplies every layer's scaling.
        cache_bytes: Budget of decoded tensors; one is always kept.

    Raises:
        MalformedFile: A file breaks its specification.
        UnsupportedModel: The architecture is not one of ours.
        WrongBase: The adapter was trained against another base, or is not of the base's pair.
        UsageError: Both an embedded and a separate adapter, the base of a pair without its adapter, a scale
            that is not finite, or one but 1 without an adapter.
    """
    if not math.isfinite(adapter_scale):
        raise UsageError("the scale of the adapter is not a number", got=adapter_scale)
    model = open_gguf(path)
    other = None if adapter is None else open_gguf(adapter)
    fields = Fields(model.metadata, str(path))
    if fields.string("general.type", "model") == "adapter":
        raise UsageError("this file is an adapter, not a model", where=path, hint="Give it as --adapter")
    architecture = fields.string("general.architecture")
    open_source = _irq_source if architecture == ARCHITECTURE else _stock_source
    source = open_source(model, other)
    if adapter_scale != 1 and not source.adapter:
        raise UsageError("there is no adapter to scale", where=path, got=f"scale {adapter_scale:g}")
    layers = {
        name: replace(layer, scaling=layer.scaling * adapter_scale) for name, layer in source.adapter.items()
    }
    folded = {
        f"{name}.{part}": _fold_loader(layer, part)
        for name, layer in layers.items()
        for part in ("lora_a", "lora_b")
    }
    return Weights(replace(source, adapter=layers, loaders={**source.loaders, **folded}), cache_bytes)


def _irq_source(gguf: GgufFile, adapter: GgufFile | None) -> Source:
    check_header(gguf, "model")
    config = read_model(gguf.metadata, IRQ_PREFIX)
    loaders = {name: _plain_loader(gguf, name) for name in plain_tensors(gguf, config)}
    for name, load in read_blocks(gguf).items():
        loaders[f"{name}.weight"] = _block_loader(load)
    layers, where = read_adapter(gguf), gguf.path
    check_base(gguf, gguf)
    if adapter is not None:
        if layers:
            raise UsageError(
                "the model embeds an adapter already",
                where=gguf.path,
                hint="Leave --adapter out, or export the model with the adapter separate",
            )
        check_header(adapter, "adapter")
        check_base(gguf, adapter)
        layers, where = read_adapter(adapter), adapter.path
        check_no_strangers(adapter, payload_names(adapter))
    check_adapter_fits(layers, config, where)
    return Source(config, loaders, layers, inverse_frequencies(config))


def _stock_source(gguf: GgufFile, adapter: GgufFile | None) -> Source:
    architecture = Fields(gguf.metadata, str(gguf.path)).string("general.architecture")
    config = read_model(gguf.metadata, architecture, gguf.tensors)
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if name not in gguf.tensors or gguf.tensors[name].shape != shape:
            raise MalformedFile(
                "tensor is missing or of another shape",
                where=f"{gguf.path}: {name}",
                expected=shape,
                got=gguf.tensors[name].shape if name in gguf.tensors else "nothing",
            )
    check_no_strangers(gguf, {*shapes, _ROPE_FACTORS})
    check_pair(gguf, adapter)
    frequencies = inverse_frequencies(config)
    if _ROPE_FACTORS in gguf.tensors:
        factors = gguf.read_f32(_ROPE_FACTORS)
        if factors.shape != frequencies.shape or not (factors > 0).all():
            raise MalformedFile("rotary factors", where=gguf.path, expected=f"{frequencies.shape}, positive")
        frequencies = frequencies / factors
    layers = {} if adapter is None else _stock_adapter(adapter, architecture)
    check_adapter_fits(layers, config, adapter.path if adapter else gguf.path)
    loaders = {name: _plain_loader(gguf, name) for name in shapes}
    return Source(config, loaders, layers, frequencies)


def _plain_loader(gguf: GgufFile, name: str) -> Callable[[], F32]:
    return lambda: gguf.read_f32(name)


def _block_loader(load: Callable[[], BlockTensor]) -> Callable[[], F32]:
    return lambda: load().dequantize()


def _fold_loader(layer: LoraLayer, part: str) -> Callable[[], FloatArray]:
    """Fold in float64, so that a working dtype rounds once at most."""

    def load() -> FloatArray:
        a, b = layer.lora_a.astype(np.float64), layer.lora_b.astype(np.float64)
        folded: FloatArray = getattr(fold(replace(layer, lora_a=a, lora_b=b)), part)
        return folded

    return load


def _stock_adapter(gguf: GgufFile, architecture: str) -> dict[str, LoraLayer]:
    """Read a LoRA file of llama.cpp: ``<tensor>.weight.lora_a`` and ``.lora_b`` in pairs.

    The scaling is ``alpha / rank``, but 1 where alpha is 0 or absent (llama.cpp, llama-adapter.h).
    """
    fields = Fields(gguf.metadata, str(gguf.path))
    for key, expected in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", architecture),
    ):
        if (got := fields.string(key)) != expected:
            raise UnsupportedModel(
                "not a LoRA adapter for this model",
                where=f"{gguf.path}: {key}",
                expected=expected,
                got=got,
            )
    alpha = fields.number("adapter.lora.alpha", 0.0)
    names = {name.rpartition(".lora_")[0] for name in gguf.tensors}
    layers = {}
    for name in sorted(names):
        pair = [f"{name}.lora_a", f"{name}.lora_b"]
        if not name.endswith(".weight") or not all(part in gguf.tensors for part in pair):
            raise MalformedFile("not a pair of LoRA matrices", where=gguf.path, expected=" and ".join(pair))
        a, b = (gguf.read_f32(part) for part in pair)
        layer = LoraLayer(a, b, scaling=alpha / a.shape[0] if alpha else 1.0)
        layer.validate(f"{gguf.path}: {name}")
        layers[name.removesuffix(".weight")] = layer
    check_no_strangers(gguf, {f"{name}.lora_{x}" for name in names for x in "ab"})
    return layers
