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

__all__ = ["COMPANIONS", "companion_files"]

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "config.json",  # by which tools know a Hugging Face folder
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def companion_files(directory: Path) -> list[Path]:
    """Return the files of a checkpoint that are copied as they are; never code, never weights."""
    found = {file for pattern in _PATTERNS for file in directory.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.suffix not in (".py", ".safetensors"))


def _copy(directory: Path, checkpoint: Checkpoint, options: OnnxOptions) -> None:
    for file in companion_files(checkpoint.path):
        shutil.copyfile(file, directory / file.name)


COMPANIONS: tuple[Callable[[Path, Checkpoint, OnnxOptions], None], ...] = (
    _copy,
    write_genai_config,
    write_library,
)
