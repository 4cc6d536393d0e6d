"""Reading files that cannot be trusted to stay what they are.

A :class:`FixedFile` remembers the identity and size a file had when it was opened first. Every read is
a bounded ``read`` (never a memory map, so a shrinking file cannot raise SIGBUS) that checks both again.
Bounds are always checked against the size on disk before anything is allocated.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from irq_formats.errors import MalformedFile, UsageError

__all__ = ["FixedFile", "open_fixed", "read_small"]

Identity = tuple[int, int, int, int]  # device, inode, size (bytes), mtime (ns)


@dataclass(frozen=True)
class FixedFile:
    """A regular file with the size and identity it had at first sight.

    Attributes:
        path: Where it is.
        identity: (device, inode, size in bytes, modification time in ns).
    """

    path: Path
    identity: Identity

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.identity[2]

    def read_bytes(self, offset: int, nbytes: int) -> bytes:
        """Return exactly ``nbytes`` bytes from ``offset``.

        Raises:
            MalformedFile: The range leaves the file, or the file changed since it was opened.
        """
        return self.read_array(offset, np.uint8, (nbytes,)).tobytes()

    def is_zero(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Return whether the bytes of many short ranges, (first, end) each, are all zero.

        Raises:
            MalformedFile: The file changed since it was opened.
        """
        with _opened(self.path) as fd:
            if _identity(fd, self.path) != self.identity:
                raise _changed(self.path)
            try:
                return all(os.pread(fd, end - first, first) == bytes(end - first) for first, end in ranges)
            except OSError as error:
                raise MalformedFile("cannot be read", where=self.path, got=error.strerror) from error

    def read_array(self, offset: int, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """Return a new array read from ``offset``, C order.

        Raises:
            MalformedFile: The range leaves the file, or the file changed since it was opened.
        """
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if min(offset, nbytes) < 0 or nbytes > self.size - offset:
            raise MalformedFile(
                "data lies outside the file",
                where=self.path,
                expected=f"at most {self.size} bytes",
                got=f"bytes {offset} to {offset + nbytes}",
            )
        raw = np.empty(nbytes, np.uint8)
        with _opened(self.path) as fd:
            if _identity(fd, self.path) != self.identity:
                raise _changed(self.path)
            _read_into(fd, offset, raw.data, self.path)
        return raw.view(dtype).reshape(shape)


def open_fixed(path: str | Path) -> FixedFile:
    """Take the identity of a regular file.

    Raises:
        UsageError: There is no such file, or it may not be read.
        MalformedFile: It is a directory, pipe, device or socket.
    """
    path = Path(path)
    try:
        with _opened(path) as fd:
            return FixedFile(path, _identity(fd, path))
    except OSError as error:
        raise UsageError("cannot be opened", where=path, got=error.strerror) from error


def read_small(path: str | Path, *, limit: int) -> bytes:
    """Return the contents of a regular file of at most ``limit`` bytes.

    Raises:
        UsageError: There is no such file, or it may not be read.
        MalformedFile: It is no regular file, larger, or changed while it was read.
    """
    file = open_fixed(path)
    if file.size > limit:
        raise MalformedFile("too large", where=path, expected=f"at most {limit} bytes", got=file.size)
    return file.read_bytes(0, file.size)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a FIFO must not hang
    try:
        yield fd
    finally:
        os.close(fd)


def _identity(fd: int, path: Path) -> Identity:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise MalformedFile("not a regular file", where=path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_into(fd: int, offset: int, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise MalformedFile("cannot be read", where=path, got=error.strerror) from error
        if count == 0:
            raise _changed(path)
        done += count


def _changed(path: Path) -> MalformedFile:
    return MalformedFile(
        "the file changed while it was being read", where=path, hint="Is it still being written?"
    )
