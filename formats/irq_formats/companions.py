"""Files that belong to a model beside its weights, and are copied with it as they are."""

from __future__ import annotations

from pathlib import Path

from irq_formats.hf_tokenizer import MORE_TEMPLATES

__all__ = ["companion_files"]

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    f"{MORE_TEMPLATES}/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def companion_files(directory: Path) -> list[Path]:
    """Return tokenizer, chat templates, generation settings and licence; never code, never weights."""
    found = {file for pattern in _PATTERNS for file in directory.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.suffix not in (".py", ".safetensors"))
