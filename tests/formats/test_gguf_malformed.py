"""The malformed corpus: every case ends in one exception type, soon, in little memory, for its reason."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from malformed_corpus import Case, load_cases, open_case
from tolerance import MALFORMED_MEMORY_BYTES, MALFORMED_SECONDS

from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel
from irq_formats.gguf import open_gguf
from irq_formats.gguf.model_keys import read_model
from irq_formats.safetensors_io import open_safetensors, open_sharded
from scripts import malformed_gguf, malformed_model, malformed_safetensors, raw_gguf

CASES = load_cases()


@pytest.mark.parametrize("case", CASES, ids=[f"{c.kind}-{c.name}" for c in CASES])
def test_case_is_refused(case: Case) -> None:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(IrqError) as caught:
            open_case(case)
        seconds = time.perf_counter() - start
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allowed = (MalformedFile,) if case.level == "container" else (MalformedFile, UnsupportedModel)
    assert isinstance(caught.value, allowed)
    assert case.message in str(caught.value)
    assert seconds < MALFORMED_SECONDS
    assert peak_bytes < MALFORMED_MEMORY_BYTES


def test_counts() -> None:
    """The corpus cannot shrink unnoticed."""
    counts = {
        key: len(load_cases(*key))
        for key in [("gguf", "container"), ("gguf", "model"), ("safetensors",), ("onnx",)]
    }
    assert counts == {("gguf", "container"): 123, ("gguf", "model"): 14, ("safetensors",): 63, ("onnx",): 78}
    assert len({(c.kind, c.name) for c in CASES}) == len(CASES)


def test_what_the_cases_start_from_is_sound(tmp_path: Path) -> None:
    """Else every case would be refused for a fault they share."""
    good = tmp_path / "good.gguf"
    good.write_bytes(raw_gguf.GOOD.encode())
    assert list(open_gguf(good).tensors) == ["a", "b"]
    shards = malformed_gguf.good_shards()
    for name, data in (shards | malformed_safetensors.good_shards()).items():
        (tmp_path / name).write_bytes(data)
    assert list(open_gguf(tmp_path / next(iter(shards))).tensors) == ["a", "b"]
    assert sorted(open_sharded(tmp_path).tensors) == ["a", "b"]
    (tmp_path / "one.safetensors").write_bytes(malformed_safetensors.encode(malformed_safetensors.GOOD))
    assert sorted(open_safetensors(tmp_path / "one.safetensors").tensors) == ["a", "b"]
    (tmp_path / "model.gguf").write_bytes(malformed_model.encode(malformed_model.keys()))
    gguf = open_gguf(tmp_path / "model.gguf")
    assert read_model(gguf.metadata, "llama", gguf.tensors).num_hidden_layers == 1


CHILD = """
import resource, sys
from irq_formats.errors import IrqError
from malformed_corpus import load_cases, open_case
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
refused = 0
for case in load_cases():
    try:
        open_case(case)
    except IrqError:
        refused += 1
print(refused)
"""


def test_whole_corpus_under_a_memory_limit_of_the_kernel(repo: Path) -> None:
    """Address space may grow by 64 MiB for the whole corpus, whoever allocates."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(MALFORMED_MEMORY_BYTES)],
        cwd=repo / "tests",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(len(CASES))), done.stderr
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert cpu_seconds < len(CASES) * MALFORMED_SECONDS
