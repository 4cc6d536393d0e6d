"""The transformers quantizer ``ir-qlora``: models open with ``AutoModelForCausalLM.from_pretrained``.

Importing this module registers it; :func:`load_model` imports it for you and checks the checkpoint first.
A checkpoint's linear layers become :class:`~irq_export.block_modules.IrqLinear` before the weights are
loaded, so the parts go from the file into the model as they are. A floating-point model, opened with
``quantization_config=IrqConfig(...)``, is quantised once it is loaded (:mod:`irq_export.quantize_loaded`).
"""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import fields
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
from irq_export.icq import SearchConfig, check_settings
from irq_export.quantize_loaded import block_layer, quantize_loaded
from irq_export.quantize_plan import EMBEDDING, HEAD
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.quantization import QUANT_METHOD, Quantization

__all__ = ["IrqConfig", "IrqQuantizer", "load_model"]

_logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class IrqConfig(QuantizationConfigMixin):
    """``quantization_config`` of transformers: what a checkpoint says about itself, or a wish.

    Args:
        **values: The JSON object of a checkpoint (spec/irq-checkpoint.md, section 3); or, for a model in
            floating point, any of the settings of ``irq-export quantize``: ``codebook``, ``block_size``,
            ``scale``, ``tau``, ``scale_rounding``, ``icq``, ``objective``, ``tie``, ``refine``, ``numerics``,
            ``embedding``, ``include``, ``exclude``.

    Raises:
        MalformedFile: The object of a checkpoint breaks the specification.
        UnsupportedModel: It is of another version.
        UsageError: Settings that are unknown or contradict each other.
    """

    base_hash: str

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        if "base_hash" in values:
            Quantization.from_dict(values, where="config.json")
        else:
            values.pop("quant_method", None)
            _wish(values)
        self.__dict__.update(copy.deepcopy(values))

    @property
    def is_wish(self) -> bool:
        """Whether it asks for a quantisation instead of describing one."""
        return "base_hash" not in self.__dict__


_SPEC_KEYS = tuple(field.name for field in fields(BlockSpec))
_SEARCH_KEYS = ("icq", "objective", "tie", "refine", "numerics")
_CHOICE_KEYS = ("embedding", "include", "exclude")


def _wish(values: dict[str, Any]) -> tuple[BlockSpec, SearchConfig, dict[str, Any]]:
    """Read the settings of a wish; return storage, search, and which layers."""
    known = (*_SPEC_KEYS, *_SEARCH_KEYS, *_CHOICE_KEYS)
    if unknown := values.keys() - set(known):
        raise UsageError("unknown settings of IrqConfig", expected=", ".join(known), got=sorted(unknown))
    spec = BlockSpec(**{key: values[key] for key in _SPEC_KEYS if key in values})
    chosen = {key: values[key] for key in _SEARCH_KEYS if key in values}
    search = SearchConfig.for_codebook(spec.codebook, **chosen)
    check_settings(spec, search)
    return spec, search, {key: values[key] for key in _CHOICE_KEYS if key in values}


@register_quantizer(QUANT_METHOD)
class IrqQuantizer(HfQuantizer):
    """Puts the block modules in place: before the weights are loaded, or from weights in floating point."""

    requires_calibration = False
    quantization_config: IrqConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replace every quantised layer of the (still empty) model.

        Raises:
            UnsupportedModel: The model class is not the causal language model of the checkpoint.
        """
        if self.quantization_config.is_wish:
            if self.pre_quantized:
                raise UsageError("the checkpoint has no quantization_config of its own")
            return
        quantization = Quantization.from_dict(self.quantization_config.to_dict(), where="config.json")
        for name, spec in quantization.modules.items():
            try:
                layer = model.get_submodule(name)
            except AttributeError as error:
                raise UnsupportedModel(
                    f"{type(model).__name__} has no {name}",
                    hint="Open the checkpoint with AutoModelForCausalLM",
                ) from error
            model.set_submodule(name, block_layer(layer, spec, name))
        _tie_head(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Quantise what came in floating point, and tell every layer which base it belongs to."""
        if self.quantization_config.is_wish:
            values = self.quantization_config.to_dict()
            del values["quant_method"]
            spec, search, choice = _wish(values)
            quantization = quantize_loaded(model, spec, search, **choice)
            _tie_head(model)
            self.quantization_config = IrqConfig(**quantization.to_dict())
            model.config.quantization_config = self.quantization_config
        for module in model.modules():
            if isinstance(module, BlockModule):
                module.base_hash = self.quantization_config.base_hash
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace the block modules by plain layers with the decoded weights (``model.dequantize()``)."""
        tied = isinstance(model.get_submodule(HEAD), IrqTiedHead)
        for name, module in list(model.named_modules()):
            if isinstance(module, BlockModule):
                model.set_submodule(name, _plain_layer(module, dtype))
        if tied:
            model.set_submodule(HEAD, _linear(model.get_submodule(EMBEDDING).get_parameter("weight")))
            del model._tied_weights_keys  # the class attribute counts again
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` would write no manifest: the checkpoint directory itself is the model."""
        _logger.warning(
            "An IR-QLoRA model is not saved with save_pretrained: copy its checkpoint directory, or write "
            "one (irq_export.quantize_loaded.save_checkpoint), and save the adapter alone."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients flow through the frozen layers."""
        return True


def _tie_head(model: PreTrainedModel) -> None:
    """Let the head of a tied model compute with the quantised embedding."""
    embedding = model.get_submodule(EMBEDDING)
    if isinstance(embedding, IrqEmbedding) and model.config.tie_word_embeddings:
        model.set_submodule(HEAD, IrqTiedHead(embedding))
        model._tied_weights_keys = None  # type: ignore[assignment]  # no two parameters are left to tie
        model.all_tied_weights_keys = {}


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
