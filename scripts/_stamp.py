"""Which file, at which state: so that what was kept from another one is not taken for this one's."""

from __future__ import annotations

from pathlib import Path


def stamp(path: Path) -> list[list[str | int]]:
    """Name, size and time of change of a file, or of every file of a directory."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
