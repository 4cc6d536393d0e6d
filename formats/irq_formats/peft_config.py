"""``adapter_config.json`` of PEFT: what it says about the numbers, and what we refuse in it.

Every option that changes what a layer computes and that a plain LoRA cannot express is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.files import open_fixed
from irq_formats.strict_json import parse_object

__all__ = ["PLAIN_LORA_HINT", "LoraConfig", "read_lora_config", "refuse_variants"]

PLAIN_LORA_HINT = "Only plain and IEC LoRA on linear layers can be exported; merge or retrain without it."

_MAX_CONFIG_BYTES = 4 << 20
# Pattern keys are regular expressions from an untrusted file: only forms that match in linear time.
_SAFE_PATTERN = re.compile(r"(?:[\w.^|-]|\\[.d]|\[[\w-]+\])+")

_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "fan_in_fan_out": "Conv1D base layers",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a bias inside the LoRA branch",
    "modules_to_save": "fully trained modules",
    "target_parameters": "LoRA on raw parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_dora": "DoRA",
}
_KEPT_USE_OPTIONS = {"use_rslora"}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraConfig:
    """The part of ``adapter_config.json`` that decides the numbers.

    Attributes:
        rank: ``r``, the default of every layer.
        alpha: ``lora_alpha``, the default of every layer.
        use_rslora: Whether alpha is divided by sqrt(r) instead of r.
        rank_pattern: Exceptions from ``rank``, by module pattern.
        alpha_pattern: Exceptions from ``alpha``, by module pattern.
        raw: The whole document.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    raw: Mapping[str, object]

    def rank_of(self, module: str) -> float:
        """Return the rank that the configuration gives a module."""
        return _match_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """Return the multiplier of a module's branch of the given rank."""
        alpha = _match_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (sqrt(rank) if self.use_rslora else rank)


def read_lora_config(path: Path) -> LoraConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        MalformedFile: Missing, too large, not strict JSON, or a number that is none.
        UnsupportedModel: Another method than LoRA, or a variant that is not a LoRA of linear layers.
    """
    raw = _read_json_object(path)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedModel(
            "not a LoRA adapter",
            where=path,
            expected='"peft_type": "LORA"',
            got=raw.get("peft_type"),
            hint=PLAIN_LORA_HINT,
        )
    refuse_variants(raw, path)
    rank = _number(raw.get("r"), "r", path)
    if rank < 1 or rank != int(rank):
        raise MalformedFile("r is not a rank", where=path, expected="an integer >= 1", got=rank)
    use_rslora = raw.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise MalformedFile(
            "use_rslora is not a boolean", where=path, expected="true or false", got=use_rslora
        )
    return LoraConfig(
        rank=int(rank),
        alpha=_number(raw.get("lora_alpha"), "lora_alpha", path),
        use_rslora=use_rslora,
        rank_pattern=_pattern(raw.get("rank_pattern"), "rank_pattern", path),
        alpha_pattern=_pattern(raw.get("alpha_pattern"), "alpha_pattern", path),
        raw=raw,
    )


def _read_json_object(path: Path) -> dict[str, object]:
    if not path.parent.is_dir():
        raise UsageError("no such directory", where=path.parent, expected="the folder of an adapter")
    if not path.is_file():
        raise MalformedFile(
            "not an adapter: the configuration is missing",
            where=path,
            hint="Point to the folder that PEFT's save_pretrained wrote.",
        )
    file = open_fixed(path)
    if file.size > _MAX_CONFIG_BYTES:
        raise MalformedFile(
            "the configuration is too large",
            where=path,
            expected=f"at most {_MAX_CONFIG_BYTES} bytes",
            got=file.size,
        )
    return parse_object(file.read_bytes(0, file.size), where=path)


def refuse_variants(raw: Mapping[str, object], path: Path | str) -> None:
    """Refuse every option that changes what the layer computes and that a plain LoRA cannot express.

    Raises:
        UnsupportedModel: There is one.
    """
    for key, value in raw.items():
        refused = key in _REFUSED_OPTIONS or (key.startswith("use_") and key not in _KEPT_USE_OPTIONS)
        if refused and value:
            raise UnsupportedModel(
                f"the adapter uses {_REFUSED_OPTIONS.get(key, key)}",
                where=path,
                expected=f"{key} unset",
                got=value,
                hint=PLAIN_LORA_HINT,
            )
    if raw.get("bias", "none") != "none":
        raise UnsupportedModel(
            "the adapter trains biases of the base",
            where=path,
            expected='"bias": "none"',
            got=raw["bias"],
            hint=PLAIN_LORA_HINT,
        )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UnsupportedModel(
            "the initialisation changed the base weights, so A and B alone are not the adapter",
            where=path,
            expected="init_lora_weights true or gaussian",
            got=init,
            hint="Save it with PEFT's path_initial_model_for_weight_conversion.",
        )


def _number(value: object, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise MalformedFile(f"{key} is not a number", where=path, expected="a number", got=value)
    if not isfinite(value):
        raise MalformedFile(f"{key} is not finite", where=path, expected="finite", got=value)
    return float(value)


def _pattern(value: object, key: str, path: Path) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedFile(f"{key} is not an object", where=path, expected="an object", got=value)
    for name in value:
        if not _is_safe_pattern(name):
            raise UnsupportedModel(
                f"{key} uses a regular expression that is not supported",
                where=path,
                expected="module names or suffixes, with . ^ | \\. \\d [0-9] at most",
                got=name,
                hint="Write one entry per module.",
            )
    return {name: _number(number, f"{key}[{name!r}]", path) for name, number in value.items()}


def _is_safe_pattern(name: str) -> bool:
    try:
        re.compile(name)
    except re.error:
        return False
    return _SAFE_PATTERN.fullmatch(name) is not None


def _match_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first key that matches the module name or a dotted suffix, as PEFT does."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
