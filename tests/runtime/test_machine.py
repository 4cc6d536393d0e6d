"""The default number of threads, on machines that are described in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from irq_runtime.machine import default_threads


def machine(folder: Path, cores: list[str], quota: str | None = None) -> Path:
    """A sysfs in which the logical CPUs of each core are listed as Linux does."""
    for core in cores:
        for cpu in core.split(","):
            topology = folder / f"devices/system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(core + "\n")
    if quota is not None:
        (folder / "fs/cgroup").mkdir(parents=True)
        (folder / "fs/cgroup/cpu.max").write_text(quota + "\n")
    return folder


@pytest.mark.parametrize(
    ("cores", "usable", "quota", "expected"),
    [
        (["0", "1"], {0, 1}, None, 2),
        (["0,2", "1,3"], {0, 1, 2, 3}, None, 2),  # two threads a core
        (["0,2", "1,3"], {0, 2}, None, 1),  # taskset
        (["0", "1", "2", "3"], {0, 1, 2, 3}, "max 100000", 4),
        (["0", "1", "2", "3"], {0, 1, 2, 3}, "250000 100000", 2),  # docker run --cpus 2.5
        (["0", "1"], {0, 1}, "50000 100000", 1),
        (["0", "1"], {0, 1}, "nonsense", 2),
        ([], {0, 1, 2}, None, 3),  # no sysfs
        ([str(i) for i in range(64)], set(range(64)), None, 32),
    ],
)
def test_threads(
    cores: list[str],
    usable: set[int],
    quota: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: usable)
    assert default_threads(machine(tmp_path, cores, quota)) == expected


def test_this_machine() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
