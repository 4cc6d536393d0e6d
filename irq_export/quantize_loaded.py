"""Quantise a model that transformers has loaded, and write a model in memory as a checkpoint.

This is what ``from_pretrained(..., quantization_config=IrqConfig(...))`` does with a floating-point model. It
holds the whole model in memory, while ``irq-export quantize`` reads it tensor by tensor; both find the same
codes, and the same base hash where the tensors were loaded in their own dtype (``dtype="auto"``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from irq_export.block_modules import BlockModule, IrqEmbedding, IrqHead, IrqLinear
from irq_export.icq import SearchConfig, quantize_tensor
from irq_export.quantize_plan import EMBEDDING, HEAD, INT8, choose_linears
from irq_formats.blocks import BlockSpec, BlockTensor, encode_int8
from irq_formats.checkpoint import base_hash, hash_line, hf_tensor_shapes, safetensors_dtype
from irq_formats.checkpoint_writer import checkpoint_writer
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.model import ModelConfig
from irq_formats.names import linear_names
from irq_formats.quantization import Quantization
from irq_formats.safetensors_io import TensorSpec

__all__ = ["block_layer", "model_config", "quantize_loaded", "save_checkpoint"]

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def model_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return ``config.json`` of a model, without its quantisation."""
    values: dict[str, Any] = model.config.to_dict()
    values.pop("quantization_config", None)
    return values


def block_layer(layer: nn.Module, spec: BlockSpec, name: str) -> BlockModule:
    """Return the (empty) block module that stands in for a layer.

    Raises:
        UnsupportedModel: The layer is neither linear nor an embedding.
    """
    if isinstance(layer, nn.Linear):
        kind = IrqHead if name == HEAD else IrqLinear
        return kind(spec, layer.in_features, layer.out_features, bias=layer.bias is not None)
    if isinstance(layer, nn.Embedding):
        return IrqEmbedding(spec, layer.num_embeddings, layer.embedding_dim)
    raise UnsupportedModel(
        "cannot be quantised", where=name, expected="Linear | Embedding", got=type(layer).__name__
    )


@torch.no_grad()
def quantize_loaded(
    model: PreTrainedModel,
    spec: BlockSpec,
    search: SearchConfig,
    *,
    embedding: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Quantization:
    """Replace the linear layers of a model by quantised ones, in place, one after the other.

    Args:
        model: On one device, which also searches.
        spec: Of the linear layers.
        search: How scales and offsets are found.
        embedding: ``int8`` quantises the embedding and a head of its own to Q8_0.
        include: Shell patterns of module names; where given, only linears that match are quantised.
        exclude: Shell patterns of linears that are not quantised.

    Returns:
        What a checkpoint of this model says about itself.

    Raises:
        UsageError: A pattern matches nothing, or the model is spread over devices.
        UnsupportedModel: A family, layer or weight that cannot be quantised.
    """
    config = ModelConfig.from_hf(model_config(model))
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UsageError(
            "a model on several devices is not quantised while loading",
            hint="Quantise it first: irq-export quantize MODEL -o CHECKPOINT",
        )
    skipped: dict[str, str] = {}
    specs = dict.fromkeys(choose_linears(linear_names(config), include, exclude, skipped), spec)
    if embedding == "int8":
        specs |= {EMBEDDING: INT8} | ({} if config.tie_word_embeddings else {HEAD: INT8})
    modules: dict[str, BlockSpec] = {}
    for name, wanted in specs.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        if weight.shape[1] % wanted.block_size:
            reason = f"{weight.shape[1]} inputs are not a multiple of the block size {wanted.block_size}"
            skipped[f"{name}.weight"] = reason
            continue
        block = _quantize(weight, wanted, search, f"{name}.weight")
        stand_in = block_layer(layer, block.spec, name).to(weight.device)
        stand_in.load_block(block)
        if isinstance(stand_in, IrqLinear) and isinstance(layer, nn.Linear):
            stand_in.bias = layer.bias
        if isinstance(stand_in, IrqEmbedding):
            stand_in.to(weight.dtype)
        model.set_submodule(name, stand_in)
        modules[name] = block.spec
    ordered = {name: modules[name] for name in _modules(config) if name in modules}
    lines = (
        hash_line(declared.name, declared.dtype, declared.shape, load()) for declared, load in _tensors(model)
    )
    return Quantization(spec, ordered, skipped, search.to_dict(), base_hash(lines, ordered))


def save_checkpoint(
    model: PreTrainedModel, path: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> Quantization:
    """Write a quantised model as a checkpoint; adapters on it are left out.

    Args:
        model: Loaded by :class:`~irq_export.quantizer.IrqQuantizer`, with or without PEFT around it.
        path: The directory.
        tokenizer: Saved beside it (``save_pretrained``).
        overwrite: Replace an existing checkpoint.

    Returns:
        What was written as ``quantization_config``.

    Raises:
        UsageError: The model is not quantised, or its tensors are no longer those that were hashed.
        OutputExists: ``path`` exists and ``overwrite`` is false.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base: PreTrainedModel = unwrap() if unwrap else model
    known = getattr(base.config, "quantization_config", None)
    if known is None:
        raise UsageError("the model is not quantised", where=path)
    said = Quantization.from_dict(known if isinstance(known, dict) else known.to_dict(), where="the model")
    with checkpoint_writer(path, overwrite=overwrite) as writer:
        for name in _modules(ModelConfig.from_hf(model_config(base))):
            if name in said.modules:
                writer.add_block(name, _block_module(base, name).block_tensor())
        for declared, load in _tensors(base, parts=False):
            writer.add_plain(declared, load)
        if tokenizer is not None:
            with TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                for file in sorted(Path(folder).rglob("*")):
                    if file.is_file():
                        writer.copy_file(Path(folder), file)
        written = writer.finish(model_config(base), spec=said.spec, skipped=said.skipped, search=said.search)
        if written.base_hash != said.base_hash:
            raise UsageError(
                "the tensors of the model changed since it was loaded",
                where=path,
                expected=f"base hash {said.base_hash}",
                got=written.base_hash,
                hint="Cast a model through from_pretrained(dtype=...), before it is hashed",
            )
    return written


def _quantize(weight: Tensor, spec: BlockSpec, search: SearchConfig, where: str) -> BlockTensor:
    if spec == INT8:
        return encode_int8(weight.float().cpu().numpy())
    return quantize_tensor(weight, spec, search, where=where).block


def _modules(config: ModelConfig) -> list[str]:
    """Modules with a weight, in the order of the model."""
    return [name.removesuffix(".weight") for name in hf_tensor_shapes(config) if name.endswith(".weight")]


def _block_module(model: nn.Module, name: str) -> BlockModule:
    """Return a quantised layer, whatever PEFT has put around it."""
    layer = model.get_submodule(name)
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, BlockModule):
        raise UsageError("is not a quantised layer", where=name, got=type(layer).__name__)
    return layer


def _tensors(model: PreTrainedModel, *, parts: bool = True) -> Iterator[tuple[TensorSpec, Any]]:
    """Every tensor of the base: what the file calls it, and a function that returns it."""
    for name in hf_tensor_shapes(ModelConfig.from_hf(model_config(model))):
        module, _, leaf = name.rpartition(".")
        layer = model.get_submodule(module)
        layer = getattr(layer, "base_layer", layer)
        if isinstance(layer, BlockModule) and leaf == "weight":
            arrays = layer.block_tensor().parts if parts else {}
            for part, array in arrays.items():
                declared = TensorSpec(f"{module}.{part}", safetensors_dtype(array), array.shape)
                yield declared, partial(np.asarray, array)
            continue
        tensor = layer.get_parameter(leaf)
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModel(
                "tensor dtype", where=name, expected=list(_DTYPES.values()), got=tensor.dtype
            )
        yield TensorSpec(name, _DTYPES[tensor.dtype], tuple(tensor.shape)), partial(_array, tensor)


def _array(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor as an array; BF16 as its bits."""
    held = tensor.detach().cpu().contiguous()
    array: NDArray[np.generic] = (held.view(torch.uint16) if held.dtype == torch.bfloat16 else held).numpy()
    return array
