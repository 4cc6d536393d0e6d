"""PEFT on a quantised base: LoRA layers with an Information Elastic Connection (IEC).

:class:`IrqLoraConfig` is PEFT's ``LoraConfig`` with two more fields; ``get_peft_model``, ``save_pretrained``,
``PeftModel.from_pretrained``, transformers' Trainer and TRL take it as they take any other. Importing this
module puts it and :class:`IrqLoraModel` in the places of ``LoraConfig`` and ``LoraModel`` in PEFT's tables:
``PeftModel.from_pretrained`` finds the betas (a file without our fields reads as the plain LoRA it is), and
what no exporter knows is refused before it is trained.

An adapter remembers the base hash of the checkpoint whose layers it was put on, and is refused by another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from irq_export.block_modules import BlockModule, IrqLinear
from irq_export.iec import add_elastic, elastic_weight, iec_linear
from irq_formats.adapter import check_base_hash
from irq_formats.errors import UsageError
from irq_formats.peft_adapter import BASE_HASH_KEY, WEIGHTS_NAME
from irq_formats.peft_config import refuse_variants
from irq_formats.safetensors_io import open_safetensors

__all__ = ["LINEARS", "IrqLoraConfig", "IrqLoraLinear", "IrqLoraModel"]

#: Every linear layer of the supported families but the head: the targets of the paper.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_BETAS = ("lora_beta1", "lora_beta2")
#: Ways to initialise A and B that do not look at the weight.
_INITS = (True, False, None, "gaussian", "eva")


@dataclass
class IrqLoraConfig(LoraConfig):  # type: ignore[misc]
    """``LoraConfig`` with an elastic connection and the identity of the base.

    Targets are all linear layers of the model but the head, unless ``target_modules`` says otherwise.

    Attributes:
        irq_iec: Whether the layers carry the two betas; False is plain LoRA.
        irq_base_hash: Base hash of the checkpoint; filled in when the adapter is put on a quantised model.
    """

    irq_iec: bool = field(default=True, metadata={"is_lora_variant": True})
    irq_base_hash: str | None = None

    def __post_init__(self) -> None:
        if self.target_modules in (None, "all-linear"):  # type: ignore[has-type]
            self.target_modules = list(LINEARS)
        self.task_type = self.task_type or TaskType.CAUSAL_LM  # type: ignore[has-type]
        super().__post_init__()
        kinds = (IrqLinear, nn.Linear) if self.irq_iec else (IrqLinear,)
        self._register_custom_module(dict.fromkeys(kinds, IrqLoraLinear))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read ``adapter_config.json``; the base hash may stand beside the weights instead."""
        values: dict[str, Any] = super().from_json_file(path_json_file, **kwargs)
        values["irq_iec"] = bool(values.get("irq_iec", False))
        weights = Path(path_json_file).with_name(WEIGHTS_NAME)
        if values.get("irq_base_hash") is None and weights.is_file():
            values["irq_base_hash"] = open_safetensors(weights).metadata.get(BASE_HASH_KEY)
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; a plain LoRA gets no key of ours but the hash."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("irq_iec", "irq_base_hash"):
            if not values[key]:
                del values[key]
        path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


class _IecVariant(LoraVariant):  # type: ignore[misc]
    """The two betas of a layer and the forward that uses them."""

    def supports_lora_conversion(self) -> bool:
        """``fold-adapter`` converts exactly; PEFT's approximation would drop the betas."""
        return False

    @staticmethod
    def init(module: IrqLoraLinear, adapter_name: str, **kwargs: Any) -> None:
        """Add betas of zero, in the dtype and on the device of A."""
        weight = module.lora_A[adapter_name].weight
        for name in _BETAS:
            getattr(module, name)[adapter_name] = nn.Parameter(weight.new_zeros(1))

    @staticmethod
    def forward(
        module: IrqLoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the layer's result ``(..., out)`` plus the branch on features ``x`` ``(..., in)``."""
        beta1, beta2 = (getattr(module, name)[active_adapter] for name in _BETAS)
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        hidden = add_elastic(lora_a(module.lora_dropout[active_adapter](x)), x, beta1)  # (..., r)
        y = add_elastic(lora_b(hidden), hidden, beta2)
        total: Tensor = result + module.scaling[active_adapter] * y
        return total

    @staticmethod
    def merge_safe(module: IrqLoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Not reached: :meth:`IrqLoraLinear.merge` refuses."""
        raise NotImplementedError


class IrqLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer around a quantised (or, with IEC, any) linear layer."""

    adapter_layer_names = (*Linear.adapter_layer_names, *_BETAS)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: IrqLoraConfig, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """Plain LoRA and IEC; no other variant of PEFT works on a base that stays quantised."""
        return {(): None, ("irq_iec",): _IecVariant}

    def update_layer(self, adapter_name: str, r: int, *, config: IrqLoraConfig, **kwargs: Any) -> None:
        """Add an adapter to the layer.

        Raises:
            WrongBase: It was trained against another base.
            UsageError: The configuration is none of ours.
        """
        if not isinstance(config, IrqLoraConfig):
            raise UsageError(
                "the layer needs another configuration class",
                expected="irq_export.peft_iec.IrqLoraConfig",
                got=type(config).__name__,
            )
        base_hash = getattr(self.get_base_layer(), "base_hash", None)
        check_base_hash(config.irq_base_hash, base_hash, where=f"adapter {adapter_name!r}")
        config.irq_base_hash = config.irq_base_hash or base_hash
        for name in _BETAS:
            if not hasattr(self, name):
                self.register_module(name, nn.ParameterDict())
        super().update_layer(adapter_name, r, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map features ``(..., in)`` to ``(..., out)``; one IEC adapter takes the fused way."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or len(active) != 1 or active[0] not in self.lora_variant:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = active[0]
        return iec_linear(
            self.get_base_layer(),
            x,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            *(getattr(self, beta)[name] for beta in _BETAS),
            scaling=self.scaling[name],
            dropout=self.lora_dropout[name],
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "the adapter is not merged into a quantised base: rounding it to 2-4 bits again would deploy "
            "another model than the one that was trained",
            hint="irq-export to-gguf keeps it exactly; to-gguf --merge bf16 writes a merged model in float",
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move, but never cast: a base of bytes says nothing about the dtype of its adapter."""
        base = self.get_base_layer()
        target = device or next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
        held: list[Any] = [getattr(self, name, {}) for name in self.adapter_layer_names]
        for layers in (layers for layers in held if adapter_name in layers):
            if "meta" not in (target.type, *(parameter.device.type for parameter in layers.parameters())):
                layers[adapter_name] = layers[adapter_name].to(target)


class IrqLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's tuner, which knows the elastic connections and what a quantised model can be given."""

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine adapters into a new one, as PEFT does, after their betas went into A and B without loss."""
        with self._folded(adapters):
            super().add_weighted_adapter(adapters, *args, **kwargs)

    @contextmanager
    def _folded(self, adapters: list[str]) -> Iterator[None]:
        """Let the low-rank matrices of adapters hold their elastic connections for a while."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for layer in (module for module in self.modules() if isinstance(module, IrqLoraLinear)):
                for name in (name for name in dict.fromkeys(adapters) if name in layer.lora_variant):
                    for held, beta in zip((layer.lora_A, layer.lora_B), _BETAS, strict=True):
                        weight = held[name].weight
                        kept.append((weight, weight.data))
                        weight.data = elastic_weight(weight.data, getattr(layer, beta)[name].data)
            yield
        finally:
            for weight, data in kept:
                weight.data = data

    def _is_quantized(self) -> bool:
        return any(isinstance(module, BlockModule) for module in self.model.modules())

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        """Check a configuration before any layer gets an adapter.

        Raises:
            UnsupportedModel: It asks for what no exporter knows.
            UsageError: It asks for an initialisation from weights, which a quantised layer does not hold.
        """
        super()._check_new_adapter_config(config)
        quantized = self._is_quantized()
        if quantized or getattr(config, "irq_iec", False):
            refuse_variants(config.to_dict(), type(config).__name__)
        if quantized and config.init_lora_weights not in _INITS:
            raise UsageError(
                "the initialisation reads the weight, and a quantised layer holds none",
                where=type(config).__name__,
                expected='init_lora_weights True, "gaussian" or "eva"',
                got=config.init_lora_weights,
            )

    def _create_and_replace(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give a layer its adapter.

        Raises:
            UsageError: It is the embedding or the head of a quantised model.
        """
        if target_name not in LINEARS and self._is_quantized():
            raise UsageError(
                "no exporter knows an adapter there",
                where=f"adapter {adapter_name!r}",
                expected=f"targets among {', '.join(LINEARS)}",
                got=target_name,
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, *args, **kwargs)


PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = IrqLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = IrqLoraModel
