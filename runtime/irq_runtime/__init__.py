"""irq_runtime: what runs the bytes. Never imports torch or irq_export."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irq_runtime.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> object:
    """Import the engine when it is first asked for, so that formats and tokenizers load without it."""
    if name == "Engine":
        from irq_runtime.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
