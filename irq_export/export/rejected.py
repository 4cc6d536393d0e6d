"""Where output goes that was read back and is not what it should be: beside its name, never under it."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

__all__ = ["set_aside"]


def set_aside(path: Path, name: Path) -> Path:
    """Rename a file or directory so that nobody takes it for a result.

    Args:
        path: Where it is.
        name: The name that it must not have.

    Returns:
        Where it is now: ``NAME.rejected``, or the first of ``NAME.rejected-2``, ``-3``, … that is free.
    """
    rejected = name.with_name(f"{name.name}.rejected")
    for number in count(2):
        if not os.path.lexists(rejected):
            break
        rejected = name.with_name(f"{name.name}.rejected-{number}")
    return path.rename(rejected)
