"""The transformers quantizer ``ir-qlora``: a checkpoint opens with ``AutoModelForCausalLM.from_pretrained``.

Importing this module registers it; :func:`load_model` imports it for you and checks the checkpoint first.
The linear layers become :class:`~irq_export.block_modules.IrqLinear` before the weights are loaded, so the
parts go from the file into the model as they are.
"""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import disable_progress_bar
from transformers.utils.quantization_config import QuantizationConfigMixin

from irq_export.block_modules import BlockModule, IrqEmbedding, IrqLinear, IrqTiedHead
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.quantization import QUANT_METHOD, Quantization

__all__ = ["IrqConfig", "IrqQuantizer", "load_model"]

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class IrqConfig(QuantizationConfigMixin):
    """``quantization_config`` of an IR-QLoRA checkpoint, as transformers wants it.

    Args:
        **values: The JSON object (spec/irq-checkpoint.md, section 3).

    Raises:
        MalformedFile: It breaks the specification.
        UnsupportedModel: It is of another version.
    """

    def __init__(self, **values: Any) -> None:
        Quantization.from_dict(values, where="config.json")
        self.__dict__.update(copy.deepcopy(values))


@register_quantizer(QUANT_METHOD)
class IrqQuantizer(HfQuantizer):
    """Puts the block modules in place before transformers loads the weights."""

    requires_calibration = True  # transformers' word for: does not quantise while loading

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replace every quantised layer of the (still empty) model.

        Raises:
            UnsupportedModel: The model class is not the causal language model of the checkpoint.
        """
        quantization = Quantization.from_dict(self.quantization_config.to_dict(), where="config.json")
        for name, spec in quantization.modules.items():
            try:
                layer = model.get_submodule(name)
            except AttributeError as error:
                raise UnsupportedModel(
                    f"{type(model).__name__} has no {name}",
                    hint="Open the checkpoint with AutoModelForCausalLM",
                ) from error
            model.set_submodule(name, _block_layer(layer, spec, name))
        embedding = model.get_submodule(_EMBEDDING)
        if isinstance(embedding, IrqEmbedding) and model.config.tie_word_embeddings:
            model.set_submodule(_HEAD, IrqTiedHead(embedding))
            model._tied_weights_keys = None  # type: ignore[assignment]  # no two parameters are left to tie
            model.all_tied_weights_keys = {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace the block modules by plain layers with the decoded weights (``model.dequantize()``)."""
        tied = isinstance(model.get_submodule(_HEAD), IrqTiedHead)
        for name, module in list(model.named_modules()):
            if isinstance(module, BlockModule):
                model.set_submodule(name, _plain_layer(module, dtype))
        if tied:
            model.set_submodule(_HEAD, _linear(model.get_submodule(_EMBEDDING).get_parameter("weight")))
            del model._tied_weights_keys  # the class attribute counts again
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` would write no manifest: the checkpoint directory itself is the model."""
        _logger.warning(
            "An IR-QLoRA model is not saved with save_pretrained: copy its checkpoint directory, and save "
            "the adapter alone (irq_formats.peft_adapter.write_peft_adapter)."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients flow through the frozen layers."""
        return True


def _block_layer(layer: nn.Module, spec: BlockSpec, name: str) -> BlockModule:
    """Return the (empty) block module that stands in for a layer."""
    if isinstance(layer, nn.Linear):
        return IrqLinear(spec, layer.in_features, layer.out_features, bias=layer.bias is not None)
    if isinstance(layer, nn.Embedding):
        return IrqEmbedding(spec, layer.num_embeddings, layer.embedding_dim)
    raise UnsupportedModel(
        "cannot be quantised", where=name, expected="Linear | Embedding", got=type(layer).__name__
    )


def _plain_layer(module: BlockModule, dtype: torch.dtype | None) -> nn.Module:
    """Return the ordinary layer with the decoded weight."""
    weight = nn.Parameter(module.dequantize().to(dtype or torch.float32), requires_grad=False)
    if isinstance(module, IrqEmbedding):
        return nn.Embedding(*module.shape, _weight=weight, _freeze=True)
    return _linear(weight, module.bias if isinstance(module, IrqLinear) else None)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> PreTrainedModel:
    """Open a checkpoint as a transformers model, in evaluation mode.

    Args:
        path: The checkpoint directory.
        dtype: Of activations and of the tensors that are not quantised. The quantised weights are decoded
            in float32 and then cast, whatever the dtype.
        device: Where to put it.
        verify: Check the manifest and the base hash first.

    Raises:
        MalformedFile: The checkpoint breaks its specification.
        UnsupportedModel: A model or version this version does not know.
    """
    open_checkpoint(path, verify=verify)
    if not sys.stderr.isatty():
        disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0].to(device)
    info: dict[str, object] = loaded[1]
    if problems := {key: value for key, value in info.items() if value}:
        raise MalformedFile("tensors do not match the model", where=path, got=problems)
    return model
