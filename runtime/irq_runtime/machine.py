"""The machine this process runs on, as Linux describes it: cores to compute with, memory taken."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_threads", "peak_rss"]

#: Decoding is bound by memory long before: more threads only wait for each other.
_MOST = 32


def default_threads(system: Path = Path("/sys")) -> int:
    """Return the physical cores this process may use, as its CPU affinity and its cgroup allow: 1 to 32.

    Two threads of one core share its arithmetic, so that a second one gains nothing. A container with a
    quota of CPU time sees all cores, but threads beyond the quota are stopped while others wait for them.

    Args:
        system: Where sysfs is.
    """
    cores = {_core(system, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(system), _MOST))


def peak_rss() -> int:
    """Return the largest resident size of this process so far, bytes, pages of mapped files included.

    Not ``getrusage``: its maximum outlives ``exec``, and so counts what the parent had.
    """
    [line] = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024  # kB


def _core(system: Path, cpu: int) -> str:
    """Return the list of logical CPUs on the same core, which names the core."""
    try:
        return (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota(system: Path) -> int:
    """Return the CPUs' worth of time that cgroup v2 allows."""
    try:
        quota, period = (system / "fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return _MOST
    return _MOST if quota == "max" else int(quota) // int(period)
