"""irq_formats: what the bytes mean. numpy only; never imports irq_runtime, irq_export or torch."""

from __future__ import annotations

__all__: list[str] = []
