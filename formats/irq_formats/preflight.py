"""Checks before an output is written: its name, what stands there already, and the room on the disk.

:mod:`irq_formats.atomic` makes the first two by itself; a command that works for minutes makes them all
before it starts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from irq_formats.errors import OutputExists, PreflightRefused, UsageError
from irq_formats.manifest import MANIFEST_NAME, unlisted_files

__all__ = ["check_dir_target", "check_file_target", "check_room", "is_real_dir"]


def check_file_target(target: Path, *, overwrite: bool) -> None:
    """Check that a file may be written at ``target``.

    Raises:
        UsageError: It names no file.
        OutputExists: Something is there and ``overwrite`` is false, or it is no file: a directory, device,
            pipe or socket is never replaced. A link is replaced itself, not what it points to.
    """
    _check_target(target, overwrite)
    if is_real_dir(target):
        raise OutputExists("is a directory, a file was to be written", where=target)
    if os.path.lexists(target) and not (target.is_file() or target.is_symlink()):
        raise OutputExists("is not a regular file, so it is not replaced", where=target)


def check_dir_target(target: Path, *, overwrite: bool) -> None:
    """Check that a directory may be written at ``target``.

    Raises:
        UsageError: It names no directory.
        OutputExists: Something is there and ``overwrite`` is false, or it holds what is not our own work: a
            directory is only replaced when it is empty or its manifest lists every file in it.
    """
    _check_target(target, overwrite)
    if not os.path.lexists(target):
        return
    if not is_real_dir(target):
        raise OutputExists("exists and is not a directory", where=target)
    hint = "Remove it yourself, or choose another name"
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST_NAME).is_file():
        raise OutputExists(
            f"holds files but no {MANIFEST_NAME}, so it is not replaced", where=target, hint=hint
        )
    if others := unlisted_files(target):
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise OutputExists(
            f"holds files that its {MANIFEST_NAME} does not list, so it is not replaced",
            where=target,
            got=names,
            hint=hint,
        )


def check_room(target: Path, nbytes: int) -> None:
    """Check that the disk of ``target``, whose directory need not exist yet, has room.

    Raises:
        PreflightRefused: It has not.
    """
    place = next(parent for parent in target.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < nbytes:
        raise PreflightRefused(
            "not enough disk space; nothing was written",
            where=place,
            expected=f"{nbytes:,} bytes free",
            got=f"{free_bytes:,}",
        )


def is_real_dir(path: Path) -> bool:
    """Whether it is a directory and no link to one; false for a name the system does not take."""
    return os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114


def _check_target(target: Path, overwrite: bool) -> None:
    if target.name in {"", "..", "."} or "\0" in str(target):
        raise UsageError("names no file", where=repr(str(target)))
    if os.path.lexists(target) and not overwrite:
        raise OutputExists(
            "output exists", where=target, hint="Choose another name, or overwrite it with --force"
        )
