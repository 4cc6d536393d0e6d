"""irq_runtime: what runs the bytes. Never imports torch or irq_export."""

from __future__ import annotations

__all__: list[str] = []
