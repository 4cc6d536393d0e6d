"""Atomic outputs: under its final name a file or directory is either complete or absent.

Bytes go to a hidden sibling ``.NAME.partial-PID-XXXXXXXX`` in the target directory, are fsynced and then
renamed; the directory entry is fsynced last. Missing parent directories are created. Any exception, Ctrl-C
and SIGTERM remove the partial, and the parents that were created for it. A killed process (SIGKILL, power
loss) can leave a partial, never a broken target.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TypeVar

from irq_formats.errors import OutputExists, PreflightRefused, UsageError
from irq_formats.preflight import check_dir_target, check_file_target, is_real_dir

__all__ = ["atomic_dir", "atomic_file"]

T = TypeVar("T")

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_BUFFER_BYTES = 1 << 20


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a new binary file that appears at ``path`` only when the block ends without an error.

    Args:
        path: Final name. A symbolic link there is replaced itself, never written through.
        overwrite: Replace an existing file.

    Yields:
        A writable, seekable binary file.

    Raises:
        OutputExists: ``path`` exists and ``overwrite`` is false, or it is no file.
        PreflightRefused: The disk ran full.
        UsageError: The directory is not writable.
    """
    target = Path(path)
    check_file_target(target, overwrite=overwrite)
    partial = _partial_name(target)
    with _sigterm_raises(), _parents(target), _removed_on_error(partial, target):
        with _create(partial, target) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            partial.replace(target)
        else:
            _rename_new(partial, target)
        _fsync_dir(target.parent)


@contextmanager
def atomic_dir(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a new directory that appears at ``path`` only when the block ends without an error.

    Args:
        path: Final name.
        overwrite: Replace an existing directory. To keep a slip from deleting anything else, the
            old directory must be empty or carry a ``manifest.json`` that lists every file in it.

    Yields:
        The temporary directory to write into.

    Raises:
        OutputExists: ``path`` exists and ``overwrite`` is false, or must not be replaced.
        PreflightRefused: The disk ran full.
        UsageError: The parent directory is not writable.
    """
    target = Path(path)
    check_dir_target(target, overwrite=overwrite)
    partial = _partial_name(target)
    with _sigterm_raises(), _parents(target), _removed_on_error(partial, target):
        _make(partial.mkdir, target)
        yield partial
        _fsync_tree(partial)
        if os.path.lexists(target) and overwrite:
            _swap_dirs(partial, target)
        else:
            _rename_new(partial, target)
        _fsync_dir(target.parent)


def _partial_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def _create(partial: Path, target: Path) -> BinaryIO:
    def opened() -> BinaryIO:
        return partial.open("xb", buffering=_BUFFER_BYTES)

    return _make(opened, target)


def _make(create: Callable[[], T], target: Path) -> T:
    """Run ``create``; a directory that is missing or read-only is the caller's mistake."""
    try:
        return create()
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise UsageError("cannot be created", where=target, got=error.strerror) from error


def _rename_new(partial: Path, target: Path) -> None:
    """Rename without ever replacing another writer's finished output."""
    try:
        if partial.is_dir():
            partial.rename(target)  # fails when the target is a file or a directory with entries
            return
        try:
            os.link(partial, target, follow_symlinks=False)  # fails when the target exists
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise
            if os.path.lexists(target):  # no hard links here: check, then rename
                raise FileExistsError(errno.EEXIST, "exists", str(target)) from error
            partial.rename(target)
            return
        partial.unlink()
    except OSError as error:
        if error.errno in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
            raise OutputExists("appeared while it was being written", where=target) from error
        raise


def _swap_dirs(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``; between the renames the name is absent."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Create the directories above ``target``; remove those again if nothing came of it."""
    missing = [parent for parent in target.parents if not os.path.lexists(parent)]  # innermost first
    try:
        for directory in reversed(missing):
            _make(functools.partial(directory.mkdir, exist_ok=True), target)
            _fsync_dir(directory.parent)
        yield
    except BaseException:
        for directory in missing:
            with contextlib.suppress(OSError):  # not ours alone any more
                directory.rmdir()
        raise


@contextmanager
def _removed_on_error(partial: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if is_real_dir(partial):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            free_bytes = shutil.disk_usage(target.parent).free
            raise PreflightRefused(
                "the disk ran full; nothing was written",
                where=target,
                got=f"{free_bytes} bytes free after clean-up",
                hint="Free some space, or write to another disk",
            ) from error
        raise


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that clean-up runs; only where nobody else handles it."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fsync_tree(directory: Path) -> None:
    for entry in sorted(directory.iterdir()):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            _fsync_tree(entry)
        else:
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    _fsync_dir(directory)


def _fsync_dir(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
