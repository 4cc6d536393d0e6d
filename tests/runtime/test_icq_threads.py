"""The search of irq_export.icq_search over more threads than the system gives."""

from __future__ import annotations

import subprocess
import sys

# 256 threads of 8 MiB of stack each do not fit in 200 MB of addresses; a share of work is 1024 blocks.
LIMITED = """
import resource
from pathlib import Path
import numpy as np
from irq_runtime import _native
levels = np.arange(16, dtype=np.float32) / 15
book = _native.IcqBook(levels, (levels[1:] + levels[:-1]) / 2, 0, 0.0, np.arange(33))
blocks = np.random.default_rng(0).standard_normal((256 * 1024, 32)).astype(np.float32)
expected = book.plain_entropy(blocks, 1)
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(book.plain_entropy(blocks, 256) == expected > 0)
"""


def test_fewer_threads_do_the_same_work() -> None:
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
