"""Atomic outputs: whatever goes wrong, at whatever moment, the final name is whole or absent."""

# ruff: noqa: PT012  (the body of the context manager is what is tested)
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from irq_formats import atomic
from irq_formats.atomic import atomic_dir, atomic_file
from irq_formats.errors import OutputExists, PreflightRefused, UsageError
from irq_formats.manifest import write_manifest


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(path: Path, data: bytes = b"new", *, overwrite: bool = False) -> None:
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(data)


def write_dir(path: Path, *, overwrite: bool = False) -> None:
    with atomic_dir(path, overwrite=overwrite) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_bytes(b"new")
        write_manifest(directory)


class TestFile:
    def test_appears_only_at_the_end(self, tmp_path: Path) -> None:
        with atomic_file(tmp_path / "x") as file:
            file.write(b"data")
            assert len(names(tmp_path)) == 1
            assert names(tmp_path)[0].startswith(f".x.partial-{os.getpid()}-")
        assert names(tmp_path) == ["x"]
        assert (tmp_path / "x").read_bytes() == b"data"

    def test_mode_follows_the_umask(self, tmp_path: Path) -> None:
        write(tmp_path / "x")
        (tmp_path / "plain").touch()
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_any_exception_removes_the_partial(
        self, tmp_path: Path, error: type[BaseException], overwrite: bool
    ) -> None:
        if overwrite:
            (tmp_path / "x").write_bytes(b"old")
        with pytest.raises(error), atomic_file(tmp_path / "x", overwrite=overwrite) as file:
            file.write(b"new")
            raise error
        assert names(tmp_path) == (["x"] if overwrite else [])
        assert not overwrite or (tmp_path / "x").read_bytes() == b"old"

    def test_existing_target(self, tmp_path: Path) -> None:
        target = tmp_path / "x"
        target.write_bytes(b"old")
        with pytest.raises(OutputExists):
            write(target)
        assert target.read_bytes() == b"old"
        write(target, overwrite=True)
        assert target.read_bytes() == b"new"
        assert names(tmp_path) == ["x"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_directory_in_the_way(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "x").mkdir()
        with pytest.raises(OutputExists):
            write(tmp_path / "x", overwrite=overwrite)
        assert names(tmp_path) == ["x"]

    @pytest.mark.parametrize("there", [True, False], ids=["live link", "dangling link"])
    def test_link_is_replaced_not_followed(self, tmp_path: Path, there: bool) -> None:
        if there:
            (tmp_path / "aim").write_bytes(b"precious")
        (tmp_path / "x").symlink_to("aim")
        with pytest.raises(OutputExists):
            write(tmp_path / "x")
        write(tmp_path / "x", overwrite=True)
        assert not (tmp_path / "x").is_symlink()
        assert (tmp_path / "x").read_bytes() == b"new"
        assert (tmp_path / "aim").exists() == there
        assert not there or (tmp_path / "aim").read_bytes() == b"precious"

    def test_two_writers_of_one_target(self, tmp_path: Path) -> None:
        """The second to finish is told; the first one's bytes stay."""
        with pytest.raises(OutputExists, match="appeared"), atomic_file(tmp_path / "x") as late:
            write(tmp_path / "x", b"first")
            late.write(b"late")
        assert (tmp_path / "x").read_bytes() == b"first"
        assert names(tmp_path) == ["x"]

    def test_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no hard links on this file system")

        monkeypatch.setattr(os, "link", refuse)
        write(tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == b"new"
        with pytest.raises(OutputExists), atomic_file(tmp_path / "y") as file:
            (tmp_path / "y").touch()
            file.write(b"late")
        assert names(tmp_path) == ["x", "y"]

    @pytest.mark.parametrize(
        "path", ["file/x", "file/y/x", "x\0y", "d\0/x", "..", "n" * 300, "new/" + "n" * 300]
    )
    def test_impossible_place(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError):
            write(tmp_path / path)
        assert names(tmp_path) == ["file"]

    def test_parents_are_created_and_removed_with_the_partial(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError), atomic_file(tmp_path / "a" / "b" / "x") as file:
            assert names(tmp_path / "a") == ["b"]
            file.write(b"new")
            raise ValueError
        assert names(tmp_path) == []
        write(tmp_path / "a" / "b" / "x")
        assert (tmp_path / "a" / "b" / "x").read_bytes() == b"new"

    def test_device_or_pipe_is_not_replaced(self, tmp_path: Path) -> None:
        """As root, ``-o /dev/null --force`` would break the machine."""
        os.mkfifo(tmp_path / "x")
        with pytest.raises(OutputExists, match="not a regular file"):
            write(tmp_path / "x", overwrite=True)
        assert (tmp_path / "x").is_fifo()

    def test_read_only_directory(self) -> None:
        with pytest.raises(UsageError):  # not even root may create files here
            write(Path("/proc/x"))

    def test_in_a_thread(self, tmp_path: Path) -> None:
        """Signal handlers can only be set in the main thread."""
        thread = threading.Thread(target=write, args=(tmp_path / "x",))
        thread.start()
        thread.join()
        assert names(tmp_path) == ["x"]

    def test_signal_handler_is_put_back(self, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        write(tmp_path / "x")
        assert signal.getsignal(signal.SIGTERM) is before


class FullDisk:
    """A file on a disk that takes ``room`` more writes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", range(5))
def test_full_disk_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    create = atomic._create
    monkeypatch.setattr(atomic, "_create", lambda *args: FullDisk(create(*args), room))
    (tmp_path / "x").write_bytes(b"old")
    with (
        pytest.raises(PreflightRefused, match="disk ran full"),
        atomic_file(tmp_path / "x", overwrite=True) as f,
    ):
        for _ in range(5):
            f.write(b"data")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, code: int) -> None:
    """The k-th fsync of a directory of three fails: nothing is left under the final name."""
    calls = iter(range(100))
    fsync = os.fsync

    def fail(fd: int) -> None:
        if next(calls) == call:
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PreflightRefused if code == errno.ENOSPC else OSError):
        write_dir(tmp_path / "d")
    assert names(tmp_path) == []


class TestDir:
    def test_appears_only_at_the_end(self, tmp_path: Path) -> None:
        write_dir(tmp_path / "d")
        assert names(tmp_path) == ["d"]
        assert (tmp_path / "d" / "sub" / "x").read_bytes() == b"new"

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_any_exception_removes_the_partial(self, tmp_path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error), atomic_dir(tmp_path / "d") as directory:
            (directory / "sub").mkdir()
            (directory / "sub" / "x").touch()
            raise error
        assert names(tmp_path) == []

    def test_replaces_its_own_kind(self, tmp_path: Path) -> None:
        write_dir(tmp_path / "d")
        (tmp_path / "d" / "old").touch()
        write_manifest(tmp_path / "d")
        with pytest.raises(OutputExists):
            write_dir(tmp_path / "d")
        write_dir(tmp_path / "d", overwrite=True)
        assert names(tmp_path / "d") == ["manifest.json", "sub"]
        assert names(tmp_path) == ["d"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    @pytest.mark.parametrize("call", [0, 1, 2])
    def test_old_directory_comes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: type[BaseException]
    ) -> None:
        """The k-th rename fails, or Ctrl-C comes just before it."""
        write_dir(tmp_path / "d")
        (tmp_path / "d" / "old").touch()
        write_manifest(tmp_path / "d")
        calls, rename = iter(range(100)), Path.rename

        def fail(path: Path, target: Path) -> Path:
            if next(calls) == call:
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        if call < 2:
            with pytest.raises(error):
                write_dir(tmp_path / "d", overwrite=True)
        else:
            write_dir(tmp_path / "d", overwrite=True)
        assert (tmp_path / "d" / "old").exists() == (call < 2)
        assert names(tmp_path) == ["d"]

    def test_empty_directory_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        with pytest.raises(OutputExists):
            write_dir(tmp_path / "d")
        write_dir(tmp_path / "d", overwrite=True)
        assert names(tmp_path / "d") == ["manifest.json", "sub"]

    def test_never_replaces_what_is_not_ours(self, tmp_path: Path) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis").touch()
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("home")
        for name in ("home", "file", "link"):
            with pytest.raises(OutputExists):
                write_dir(tmp_path / name, overwrite=True)
        assert (tmp_path / "home" / "thesis").exists()
        assert names(tmp_path) == ["file", "home", "link"]

    def test_never_deletes_what_was_put_beside_its_own_files(self, tmp_path: Path) -> None:
        """A trained adapter in the checkpoint, say."""
        write_dir(tmp_path / "d")
        (tmp_path / "d" / "adapter").mkdir()
        (tmp_path / "d" / "adapter" / "weights").write_bytes(b"a night of training")
        with pytest.raises(OutputExists, match="adapter/weights"):
            write_dir(tmp_path / "d", overwrite=True)
        assert (tmp_path / "d" / "adapter" / "weights").exists()

    def test_parents_are_created_and_removed_with_the_partial(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError), atomic_dir(tmp_path / "a" / "b" / "d"):
            raise ValueError
        assert names(tmp_path) == []
        write_dir(tmp_path / "a" / "b" / "d")
        assert names(tmp_path / "a" / "b" / "d") == ["manifest.json", "sub"]

    def test_two_writers_of_one_target(self, tmp_path: Path) -> None:
        with pytest.raises(OutputExists, match="appeared"), atomic_dir(tmp_path / "d") as late:
            write_dir(tmp_path / "d")
            (late / "y").touch()
        assert names(tmp_path / "d") == ["manifest.json", "sub"]
        assert names(tmp_path) == ["d"]


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
import numpy as np
from irq_formats.gguf import STR, GgmlType, TensorSource, write_gguf
def load():
    time.sleep(0.01)
    return np.ones((64, 1024), np.float32)
print("ready", flush=True)
tensors = [TensorSource(f"t{i}", (64, 1024), GgmlType.F32, load) for i in range(20)]
write_gguf(sys.argv[1], {"general.architecture": STR("x")}, tensors, overwrite=True)
print("done", flush=True)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "x.gguf")],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1, 0.2])
def test_killed(child: subprocess.Popen[str], tmp_path: Path, delay_s: float) -> None:
    """SIGKILL: a partial may stay behind, the final name holds the old file or the whole new one."""
    old = tmp_path / "x.gguf"
    if not old.exists():
        old.write_bytes(b"old")
    time.sleep(delay_s)
    child.kill()
    child.wait()
    assert old.read_bytes() == b"old" or old.stat().st_size > 20 * 64 * 1024 * 4
    left = [name for name in names(tmp_path) if name != "x.gguf"]
    assert all(name.startswith(".x.gguf.partial-") for name in left)
    assert len(left) <= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(child: subprocess.Popen[str], tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM: nothing stays behind."""
    deadline = time.monotonic() + 10
    while not names(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(number)
    assert child.wait() != 0
    assert names(tmp_path) == []
