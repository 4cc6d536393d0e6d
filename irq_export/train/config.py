"""The recipe of a training run: one frozen dataclass, read from flags and from a TOML or YAML file.

The fields are the flags and the keys of the file, under the same names; flags win. Defaults are those of the
paper (arXiv 2402.05445, B.4, and the released scripts): rank 64, alpha 16, all linear layers, learning rate
2e-4 constant, 16 examples a step, gradients clipped at 0.3, about three passes over Alpaca.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import ceil, isfinite
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from irq_formats.errors import MalformedFile, UsageError
from irq_formats.files import open_fixed

__all__ = ["Setting", "TrainConfig", "make_config", "read_config_file", "settings"]

_MAX_CONFIG_BYTES = 1 << 20


def _field(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes, and where it writes."""

    model: str = _field("", "Hugging Face directory in floating point, or an IR-QLoRA checkpoint.")
    data: tuple[str, ...] = _field((), "JSON or JSON Lines file (.gz .xz .bz2 too), or hf:NAME[:SPLIT].")
    output: str = _field("", "Directory of the run: checkpoint, adapter, metrics.")
    data_format: str = _field(
        "auto",
        "Format of the data.",
        ("auto", "alpaca", "dolly", "input-output", "prompt-completion", "messages", "sharegpt", "oasst"),
    )
    prompt: str = _field(
        "auto",
        "How an example becomes text: auto is the model's chat template, without one alpaca.",
        ("auto", "chat", "alpaca", "plain"),
    )
    eval_data: tuple[str, ...] = _field((), "Held-out data, as --data.")
    max_examples: int | None = _field(None, "Use only so many examples, drawn by the seed.")
    max_length: int = _field(512, "Tokens of an example; longer ones are cut.")
    packing: bool = _field(False, "Fill rows of max_length with whole examples that do not see each other.")
    group_by_length: bool = _field(True, "Put examples of like length into one batch.")
    codebook: str = _field(
        "nf4", "Of a model in floating point.", ("nf4", "nf3", "nf2", "int4", "int3", "int2")
    )
    icq: bool | None = _field(
        None,
        "Instead of --importance: search offsets (ICQ), or plain block-wise absolute maxima, as QLoRA.",
    )
    importance: str = _field(
        "data",
        "Fit scale and offset to what the inputs of each layer carry: data measures that on the training"
        " data, none is the default of irq-export quantize, else a file of irq-export calibrate.",
    )
    embedding: str = _field("keep", "int8 quantises embedding and head too.", ("keep", "int8"))
    iec: bool = _field(True, "Elastic connections (IEC); without, plain LoRA.")
    rank: int = _field(64, "Rank of the adapter.")
    alpha: float = _field(16.0, "The adapter counts alpha / rank.")
    dropout: float = _field(0.0, "Dropout before A (paper 0.1, released code 0).")
    targets: tuple[str, ...] = _field((), "Names of linear layers to adapt; all if none is given.")
    lr: float = _field(2e-4, "Learning rate.")
    schedule: str = _field("constant", "Of the learning rate.", ("constant", "linear", "cosine"))
    warmup_steps: int = _field(0, "Steps of linear warm-up.")
    weight_decay: float = _field(0.0, "Decoupled weight decay.")
    max_grad_norm: float = _field(0.3, "Gradients are clipped to this norm.")
    adam_beta2: float = _field(0.999, "Decay of Adam's second moment.")
    optimizer: str = _field(
        "auto",
        "auto is paged_adamw_32bit (bitsandbytes) on CUDA if installed, else adamw_torch.",
        ("auto", "paged_adamw_32bit", "adamw_torch"),
    )
    batch_size: int = _field(16, "Examples a step, over all devices.")
    micro_batch: int | None = _field(
        None, "Examples a device computes at once; batch_size / devices if unset."
    )
    epochs: float = _field(3.0, "Passes over the data.")
    steps: int | None = _field(None, "Steps instead of epochs.")
    seed: int = _field(42, "Of initialisation, order and dropout.")
    device: str = _field("auto", "cpu, cuda or auto.", ("auto", "cpu", "cuda"))
    precision: str = _field(
        "auto", "Of the arithmetic: auto is bf16 on CUDA, else fp32.", ("auto", "fp32", "bf16")
    )
    gradient_checkpointing: bool = _field(True, "Recompute activations: less memory, more time.")
    fsdp: bool = _field(False, "Shard base, adapter and optimizer over the devices (FSDP2).")
    log_every: int = _field(10, "Steps between lines of metrics.")
    eval_every: int = _field(100, "Steps between evaluations, with --eval-data.")
    save_every: int = _field(500, "Steps between resumable states.")
    keep: int = _field(2, "Resumable states kept.")
    tensorboard: bool = _field(False, "Write TensorBoard events too.")

    def __post_init__(self) -> None:
        for setting in settings():
            value = getattr(self, setting.name)
            if setting.choices and value not in setting.choices:
                expected = " | ".join(setting.choices)
                raise UsageError(f"unknown {setting.flag}", expected=expected, got=value)
        positive = ("rank", "alpha", "lr", "batch_size", "epochs", "max_grad_norm", "max_length", "log_every")
        for name in (*positive, "eval_every", "save_every", "keep", "micro_batch", "steps", "max_examples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{_flag(name)} must be positive", got=value)
        for name in ("alpha", "lr", "epochs", "weight_decay"):
            if not isfinite(getattr(self, name)):
                raise UsageError(f"{_flag(name)} must be finite", got=getattr(self, name))
        if not 0 <= self.seed < 1 << 32:
            raise UsageError("--seed lies in [0, 2^32)", got=self.seed)
        if not 0 <= self.dropout < 1 or not 0 <= self.adam_beta2 < 1:
            raise UsageError("--dropout and --adam-beta2 lie in [0, 1)")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise UsageError("--warmup-steps and --weight-decay are not negative")
        if self.icq is not None and self.importance not in ("data", "none"):
            raise UsageError(
                "--icq and --no-icq fit nothing to an --importance", hint="Leave out the one or the other"
            )

    @property
    def importance_source(self) -> str | None:
        """``data``, a file, or None where nothing is fitted to it."""
        return self.importance if self.icq is None and self.importance != "none" else None

    def total_steps(self, rows: int) -> int:
        """Return the steps of a run over so many rows."""
        return self.steps or ceil(-(-rows // self.batch_size) * self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = {setting.name: getattr(self, setting.name) for setting in settings()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Setting:
    """One field of :class:`TrainConfig`, for the command line.

    Attributes:
        name: Key in a file.
        kind: ``str``, ``int``, ``float`` or ``bool``.
        many: Whether it is a list.
        optional: Whether it may be left unset.
        default: Value if nothing is said.
        text: Help.
        choices: Allowed values, if they are few.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    text: str
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return _flag(self.name)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings() -> list[Setting]:
    """Return all fields, in order."""
    hints = get_type_hints(TrainConfig)
    found = []
    for item in fields(TrainConfig):
        kinds = [kind for kind in get_args(hints[item.name]) if kind not in (type(None), Ellipsis)]
        kind = kinds[0] if kinds else hints[item.name]
        many = get_origin(hints[item.name]) is tuple
        optional = bool(kinds) and not many
        text, choices = item.metadata["help"], item.metadata["choices"]
        found.append(Setting(item.name, kind, many, optional, item.default, text, choices))
    return found


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a TOML or YAML file.

    Returns:
        Field name to value; only what the file says.

    Raises:
        UsageError: A key that does not exist (with the nearest that does), another ending, or no TOML reader.
        MalformedFile: The file does not parse, or a value has the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such file", where=path)
    file = open_fixed(path)
    if file.size > _MAX_CONFIG_BYTES:
        raise MalformedFile("too large for a configuration", where=path, got=f"{file.size} bytes")
    values = _parse(path, file.read_bytes(0, file.size))
    known = {setting.name: setting for setting in settings()}
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}"
            raise UsageError(f"unknown key {key!r}", where=path, hint=hint)
        result[name] = _typed(value, known[name], path)
    return result


def _parse(path: Path, raw: bytes) -> Mapping[str, Any]:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(raw.decode())
        except ValueError as error:  # of TOML and of UTF-8
            raise MalformedFile("not TOML", where=path, got=error) from error
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UsageError("unknown kind of configuration", where=path, expected=".toml | .yaml | .yml | .json")
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MalformedFile("not YAML", where=path, got=error) from error
    if not isinstance(values, dict):
        raise MalformedFile("not a table of settings", where=path, got=type(values).__name__)
    return values


def _typed(value: Any, setting: Setting, path: Path) -> Any:
    """Check the type of a value from a file."""
    if value is None and setting.optional:
        return None
    if setting.many:
        items = value if isinstance(value, list) else [value]
        return tuple(_typed(item, _one(setting), path) for item in items)
    if setting.kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML reads 2e-4 as a string
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, setting.kind) and (setting.kind is bool or not isinstance(value, bool)):
        return value
    raise MalformedFile(
        f"{setting.name} has the wrong type",
        where=path,
        expected=setting.kind.__name__,
        got=json.dumps(value, default=str),
    )


def _one(setting: Setting) -> Setting:
    return Setting(setting.name, setting.kind, False, False, None, setting.text, setting.choices)


def make_config(flags: Mapping[str, Any], file: str | Path | None = None) -> TrainConfig:
    """Join a file and flags; flags win, and what neither says is the default.

    Args:
        flags: Field name to value; None and empty lists say nothing.
        file: TOML or YAML.

    Raises:
        UsageError: Contradictory, unknown or missing settings.
        MalformedFile: The file does not parse.
    """
    said = {name: value for name, value in flags.items() if value is not None and value != ()}
    config = TrainConfig(**{**(read_config_file(file) if file else {}), **said})
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            where = {"model": "MODEL", "data": "--data", "output": "-o"}[name]
            raise UsageError(f"{where} is missing", hint=f"Give it, or {name} = … in --config")
    return config
