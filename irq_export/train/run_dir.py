"""The directory of a run: a checkpoint of the base, its adapter, and what is needed to go on.

::

    DIR/                 the checkpoint of the base (spec/irq-checkpoint.md), written first
    ├── adapter/         the trained adapter, written last
    └── train/
        ├── run.json     settings, base hash and data of the run
        ├── metrics.jsonl
        └── checkpoint-N/  resumable state; its manifest.json is written last and makes it valid

A state without a valid manifest was interrupted and is removed, never resumed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irq_export.train.base import is_quantized, quantize_settings
from irq_export.train.config import TrainConfig
from irq_export.train.data_formats import HUB_PREFIX
from irq_formats.atomic import atomic_dir, atomic_file
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, OutputExists, UsageError
from irq_formats.manifest import MANIFEST_NAME, check_manifest, write_manifest
from irq_formats.peft_adapter import WEIGHTS_NAME
from irq_formats.preflight import check_dir_target, check_room
from irq_formats.safetensors_io import open_safetensors
from irq_formats.strict_json import parse_object

__all__ = ["RunDir"]

#: Settings that may differ when a run goes on: they change what is written, not what is computed.
_FREE = {"log_every", "eval_every", "save_every", "keep", "tensorboard", "device", "micro_batch", "output"}
#: Settings that only say where the data lie: their digests decide whether they are the same.
_MOVABLE = {"data", "eval_data"}
#: Settings that may also differ while the learning rate does not depend on them.
_LENGTH = {"epochs", "steps"}

#: Values of settings that name files else.
_NO_FILES = {("importance", "data"), ("importance", "none")}

#: Tokens of training data below which importance is not measured on them.
_ENOUGH = 4096
#: Tokens of a window of them.
_CONTEXT = 512


@dataclass(frozen=True)
class RunDir:
    """Names inside the directory of a run.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def state(self) -> Path:
        """Where everything lies that only training needs."""
        return self.path / "train"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.state / "metrics.jsonl"

    @property
    def record_file(self) -> Path:
        """Settings, base hash and digests of the data."""
        return self.state / "run.json"

    def check_target(self, config: TrainConfig, *, resume: bool) -> None:
        """Check the directory before any work.

        Raises:
            OutputExists: It exists and the run is not resumed.
            UsageError: It is resumed and no run was begun here, or one with other settings.
        """
        if not os.path.lexists(self.path):
            check_dir_target(self.path, overwrite=False)
            return
        if not resume:
            raise OutputExists(
                "output exists", where=self.path, hint="Continue it with --resume, or choose another name"
            )
        if not self.record_file.is_file():
            raise UsageError(
                "no run was begun here",
                where=self.path,
                expected=self.record_file.relative_to(self.path),
                hint="Leave out --resume and choose another -o; a checkpoint is trained as MODEL",
            )
        free = _FREE | _MOVABLE | (_LENGTH if config.schedule == "constant" else set())
        before, now = _absolute(self._recorded().get("settings", {})), _absolute(config.to_dict())
        _compare(self.path, before, {key: value for key, value in now.items() if key not in free})

    def _recorded(self) -> dict[str, Any]:
        return dict(parse_object(self.record_file.read_bytes(), where=self.record_file))

    def prepare(
        self,
        config: TrainConfig,
        sample: Callable[[], tuple[list[int], str]],
        *,
        device: str,
        progress: Callable[[int, int, str], None] | None,
        say: Callable[[str], None],
    ) -> str:
        """Write the base, unless it is there already.

        Args:
            config: Says which model, and how it is quantised.
            sample: Returns tokens of the training data and their digest, to measure importance on.
            device: Where to measure and search.
            progress: Called with (tensors done, tensors in all, name).
            say: Called with lines for people.

        Returns:
            Its base hash.

        Raises:
            UsageError: There is no model.
            PreflightRefused: The disk has no room.
        """
        if self.path.exists():
            return open_checkpoint(self.path, verify=False).base_hash
        source = Path(config.model)
        if is_quantized(source):
            self._copy_checkpoint(source)
            return open_checkpoint(self.path, verify=False).base_hash
        from irq_export.calibrate import Importance, measure
        from irq_export.quantize_model import quantize

        importance: Importance | str | None = config.importance_source
        if importance == "data":
            ids, digest = sample()
            if len(ids) < _ENOUGH:
                say(f"the data has fewer than {_ENOUGH:,} tokens: importance is not measured")
                importance = None
            else:
                importance, perplexity = measure(
                    source, ids, digest, context=_CONTEXT, device=device, progress=progress
                )
                say(f"importance measured on {importance.tokens:,} tokens (perplexity {perplexity:.2f})")
        settings = quantize_settings(config)
        return quantize(
            source, self.path, device=device, importance=importance, progress=progress, **settings
        ).base_hash

    def _copy_checkpoint(self, source: Path) -> None:
        """Copy the files that a checkpoint's manifest lists."""
        open_checkpoint(source)
        files: Any = check_manifest(source)["files"]
        check_room(self.path, sum(entry["size_bytes"] for entry in files.values()))
        with atomic_dir(self.path) as directory:
            for name in (*files, MANIFEST_NAME):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, directory / name)

    def record(self, config: TrainConfig, identity: dict[str, Any]) -> None:
        """Write down what the run is, or check that it is the one that was begun here.

        Args:
            config: Its settings, which :meth:`check_target` compares.
            identity: Base hash and digests of the data.

        Raises:
            UsageError: The earlier run had another base or other data.
        """
        if self.record_file.is_file():
            _compare(self.path, self._recorded(), identity)
        self.state.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.record_file, overwrite=True) as file:
            record = {"settings": _absolute(config.to_dict()), **identity}
            file.write((json.dumps(record, indent=2) + "\n").encode())

    def states(self) -> list[Path]:
        """Return the resumable states, oldest first; interrupted ones are left out."""
        found = []
        for path in self.state.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            if number.isdecimal() and (path / MANIFEST_NAME).is_file():
                found.append((int(number), path))
        return [path for _, path in sorted(found)]

    def latest_state(self) -> Path | None:
        """Return the newest state whose files are what its manifest says, and remove broken ones."""
        for path in self.state.glob("checkpoint-*"):
            if not (path / MANIFEST_NAME).is_file():
                shutil.rmtree(path)
        for path in reversed(self.states()):
            try:
                check_manifest(path)
            except MalformedFile:
                shutil.rmtree(path)
                continue
            return path
        return None

    def not_finite(self, step: int) -> str | None:
        """Return the first tensor of a new state's adapter that is not finite, and remove that state.

        None if all are finite.
        """
        path = self.state / f"checkpoint-{step}"
        tensors = open_safetensors(path / WEIGHTS_NAME)
        broken = next(
            (name for name in tensors.tensors if not np.isfinite(tensors.read_f32(name)).all()), None
        )
        if broken is not None:
            shutil.rmtree(path)
        return broken

    def seal(self, step: int, keep: int) -> None:
        """Make the state of a step valid, then remove the oldest ones."""
        write_manifest(self.state / f"checkpoint-{step}", {"kind": "irq-train-state", "step": step})
        for path in self.states()[:-keep]:
            (path / MANIFEST_NAME).unlink()
            shutil.rmtree(path)

    def cut_metrics(self, step: int) -> None:
        """Drop what an interrupted run logged after the state it resumes from."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line at which it was killed
                continue
            if entry["step"] <= step:
                kept.append(line + "\n")
        with atomic_file(self.metrics, overwrite=True) as file:
            file.write("".join(kept).encode())


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the names of files as they are from any working directory."""
    found = dict(settings)
    for name in ("model", "output", "importance", "data", "eval_data"):
        value = found.get(name)
        if isinstance(value, list):
            found[name] = [_absolute_name(item) for item in value]
        elif isinstance(value, str) and (name, value) not in _NO_FILES:
            found[name] = _absolute_name(value)
    return found


def _absolute_name(source: str) -> str:
    if not source.startswith(HUB_PREFIX):
        return str(Path(source).absolute())
    name, colon, split = source.removeprefix(HUB_PREFIX).partition(":")  # of the hub, or of a directory
    return f"{HUB_PREFIX}{Path(name).absolute()}{colon}{split}" if Path(name).is_dir() else source


def _compare(where: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a run that was begun in another way; what is not on record may be anything.

    So may be what is on record as ``auto``: earlier versions did not write down what it came to.
    """
    changed = [key for key, value in now.items() if before.get(key, value) not in (value, "auto")]
    if changed:
        raise UsageError(
            "not the run that was begun here",
            where=where,
            expected=", ".join(f"{key} {before[key]}" for key in changed),
            got=", ".join(f"{key} {now[key]}" for key in changed),
            hint="Resume with the settings it was begun with, or choose another directory",
        )
