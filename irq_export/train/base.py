"""The model a run starts from, by its headers: what can be refused is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_export.quantize_plan import INT8, QuantizePlan, plan_quantization
from irq_export.train.config import TrainConfig
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import Checkpoint, open_checkpoint, read_config
from irq_formats.errors import UsageError
from irq_formats.model import ModelConfig
from irq_formats.names import gguf_to_hf, linear_names, tensor_shapes
from irq_formats.quantization import QUANT_METHOD

__all__ = ["Base", "adapted_linears", "is_quantized", "open_base", "quantize_settings"]

#: Settings that say how a model in floating point is quantised.
_RECIPE = ("codebook", "icq", "importance", "embedding")


@dataclass(frozen=True)
class Base:
    """What a run starts from.

    Attributes:
        model: Its geometry.
        source: How it will be quantised, or the checkpoint that it is.
        trainable: Parameters of the adapter that it gets.
        disk_bytes: Of the checkpoint that is written.
    """

    model: ModelConfig
    source: QuantizePlan | Checkpoint
    trainable: int
    disk_bytes: int


def open_base(config: TrainConfig) -> Base:
    """Read the headers of the model of a run.

    Raises:
        UsageError: There is no model, it has no layer of some target, or it is quantised already and the
            settings say how to quantise it.
        UnsupportedModel: It cannot be trained.
        MalformedFile: It contradicts itself.
        WrongBase: The importance was measured on another model.
    """
    path = Path(config.model)
    source: QuantizePlan | Checkpoint
    if is_quantized(path):
        _refuse_recipe(config)
        source = open_checkpoint(path, verify=False)
        model = source.model
        disk_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    else:
        settings = quantize_settings(config)
        keys = ("codebook", "tau", "scale_rounding")
        spec = BlockSpec(**{key: settings[key] for key in keys if key in settings})
        source = plan_quantization(path, spec, embedding=settings.get("embedding"))
        model = ModelConfig.from_hf(source.config)
        disk_bytes = source.output_bytes
        _check_importance(config, source)
    shapes = {gguf_to_hf(name): shape for name, shape in tensor_shapes(model).items()}
    adapted = adapted_linears(model, config.targets)
    trainable = sum(config.rank * sum(shapes[f"{name}.weight"]) + 2 * config.iec for name in adapted)
    return Base(model, source, trainable, disk_bytes)


def adapted_linears(model: ModelConfig, targets: Sequence[str]) -> list[str]:
    """Return the module names of the linear layers that get an adapter: PEFT's rule, names or ends of names.

    Raises:
        UsageError: A target is none of them. PEFT would take it where another module, as the head, has that
            name; no exporter knows an adapter there.
    """
    linears = linear_names(model)
    if not targets:
        return linears
    found = {target: [name for name in linears if f".{name}".endswith(f".{target}")] for target in targets}
    if missing := [target for target, names in found.items() if not names]:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in linears)
        raise UsageError(
            "no such linear layer",
            where="--targets",
            expected=f"{', '.join(kinds)}, or more of a name, as {linears[0]}",
            got=", ".join(missing),
        )
    return [name for name in linears if any(name in names for names in found.values())]


def is_quantized(path: Path) -> bool:
    """Whether a model directory is an IR-QLoRA checkpoint.

    Raises:
        UsageError: There is no model.
        UnsupportedModel: It is quantised in another way (said by ``quantize``).
    """
    quantization = read_config(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def quantize_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of :func:`irq_export.quantize_model.quantize` for a run.

    ``--no-icq`` is bitsandbytes' own NF4, bit for bit, for nf4; the exact arithmetic for the others.
    """
    values: dict[str, Any] = {"codebook": config.codebook, "icq": config.icq}
    if config.embedding == "int8":
        values["embedding"] = "int8"
    if config.icq is False:
        values |= {"refine": "none", "tau": "none"}
        if config.codebook == "nf4":
            values |= {"tie": "first", "numerics": "reference", "scale_rounding": "none"}
    return values


def _refuse_recipe(config: TrainConfig) -> None:
    """Refuse settings that a checkpoint, which is trained as it is, would leave without effect."""
    usual = TrainConfig()
    said = [name for name in _RECIPE if getattr(config, name) != getattr(usual, name)]
    if said:
        raise UsageError(
            "the model is quantised already, and trains as it is",
            where=config.model,
            got=", ".join(f"{name} {getattr(config, name)}" for name in said),
            hint="Leave that out, or start from the model in floating point",
        )


def _check_importance(config: TrainConfig, plan: QuantizePlan) -> None:
    """Check that a file of importance, if one is given, is of this model."""
    if config.importance_source in (None, "data"):
        return
    from irq_export.calibrate import read_importance

    importance = read_importance(config.importance)
    for tensor in plan.tensors:
        if tensor.spec not in (None, INT8):
            importance.of(tensor.module)
