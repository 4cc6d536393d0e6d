"""Fine-tuning with IR-QLoRA: data, recipe, loop, and the directory that every exporter reads."""

from __future__ import annotations

__all__: list[str] = []
