"""``quantization_config`` of a checkpoint's ``config.json`` (spec/irq-checkpoint.md, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from irq_formats.blocks import BlockSpec
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.fields import Fields

__all__ = ["CHECKPOINT_VERSION", "QUANT_METHOD", "Quantization"]

#: Name under which transformers finds the quantizer.
QUANT_METHOD = "ir-qlora"
#: Version of the layout; a reader refuses every other one.
CHECKPOINT_VERSION = 1

_SPEC_KEYS = tuple(BlockSpec().to_dict())
_KEYS = {"quant_method", "version", *_SPEC_KEYS, "modules", "skipped", "search", "base_hash"}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised.

    Attributes:
        spec: What was asked for; tensors may differ (``modules`` decides).
        modules: Spec of every quantised matrix, by Hugging Face module name.
        skipped: Tensors kept in floating point or left out, with the reason.
        search: Settings of the search that found scales and offsets, for the record only.
        base_hash: Hash of the base, 64 hexadecimal digits.
    """

    spec: BlockSpec
    modules: Mapping[str, BlockSpec]
    skipped: Mapping[str, str] = field(default_factory=dict)
    search: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    base_hash: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the JSON object."""
        return {
            "quant_method": QUANT_METHOD,
            "version": CHECKPOINT_VERSION,
            **self.spec.to_dict(),
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
            "skipped": dict(self.skipped),
            "search": dict(self.search),
            "base_hash": self.base_hash,
        }

    @classmethod
    def from_dict(cls, values: object, *, where: str | Path) -> Quantization:
        """Read the JSON object.

        Args:
            values: The parsed object.
            where: The file, for messages.

        Raises:
            UnsupportedModel: Another quantisation method or version, or a value this version does not know.
            MalformedFile: A key is missing, unknown or of the wrong type.
        """
        if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
            raise UnsupportedModel(
                "not an IR-QLoRA checkpoint",
                where=where,
                expected=f'quantization_config with quant_method "{QUANT_METHOD}"',
                got=values.get("quant_method") if isinstance(values, dict) else values,
                hint="Make one with: irq-export quantize MODEL_DIR -o OUT",
            )
        fields = Fields(values, f"{where}: quantization_config")
        if (version := fields.integer("version")) != CHECKPOINT_VERSION:
            raise UnsupportedModel(
                "checkpoint of another version", where=where, expected=CHECKPOINT_VERSION, got=version
            )
        if set(values) != _KEYS:
            raise MalformedFile("keys", where=fields.where, expected=sorted(_KEYS), got=sorted(values))
        modules = _object(values, "modules", fields.where)
        skipped = _object(values, "skipped", fields.where)
        search = _object(values, "search", fields.where)
        specs = {name: _object(modules, name, f"{fields.where}: modules") for name in modules}
        reasons = Fields(skipped, f"{fields.where}: skipped")
        for name, value in search.items():
            if not isinstance(value, str | int | float):
                raise MalformedFile(f"search setting {name}", where=fields.where, got=type(value).__name__)
        return cls(
            spec=BlockSpec.from_dict({key: values[key] for key in _SPEC_KEYS}),
            modules={name: BlockSpec.from_dict(spec) for name, spec in specs.items()},
            skipped={name: reasons.string(name) for name in skipped},
            search=search,  # type: ignore[arg-type]
            base_hash=fields.digest("base_hash"),
        )


def _object(values: Mapping[str, object], key: str, where: str) -> dict[str, object]:
    value = values[key]
    if not isinstance(value, dict):
        raise MalformedFile(f"{key} is not an object", where=where, got=type(value).__name__)
    return value
