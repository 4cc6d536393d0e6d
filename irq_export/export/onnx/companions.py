"""Files beside the model: tokenizer, chat template, generation settings, and what onnxruntime-genai asks for.

:data:`COMPANIONS` is the hook: every function in it is called with the directory under construction, the
checkpoint and the options, before the manifest is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from irq_export.export.onnx.genai import write_genai_config, write_library
from irq_export.export.onnx.options import OnnxOptions
from irq_formats.checkpoint import Checkpoint
from irq_formats.companions import companion_files

__all__ = ["COMPANIONS", "copied_files"]


def copied_files(directory: Path) -> list[Path]:
    """Return the files of a checkpoint that are copied as they are; never code, never weights."""
    return [*companion_files(directory), directory / "config.json"]  # by which tools know such a folder


def _copy(directory: Path, checkpoint: Checkpoint, options: OnnxOptions) -> None:
    for file in copied_files(checkpoint.path):
        target = directory / file.relative_to(checkpoint.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


COMPANIONS: tuple[Callable[[Path, Checkpoint, OnnxOptions], None], ...] = (
    _copy,
    write_genai_config,
    write_library,
)
