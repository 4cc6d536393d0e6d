"""Proof that an exported file computes what the checkpoint computes."""

from __future__ import annotations

__all__: list[str] = []
