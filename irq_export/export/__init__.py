"""Exporters: from a checkpoint to files that run elsewhere."""

from __future__ import annotations

__all__: list[str] = []
