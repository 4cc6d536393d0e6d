"""Structure-aware fuzzing: take a good file apart, change one to three fields, put it together again.

Whatever comes out either opens, and then writing what was read gives a file that reads the same, or is
refused with MalformedFile; never another exception, never slow, never in much memory.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_strategies import rewrite, same_value
from tolerance import MALFORMED_MEMORY_BYTES, MALFORMED_SECONDS

from irq_formats.errors import MalformedFile
from irq_formats.gguf import open_gguf
from scripts import malformed_model, raw_gguf
from scripts.raw_gguf import ARRAY, BOOL, F32, STR, U8, array, f32, info, pair, string

SEEDS = 600
SLOW_SECONDS = 30.0
EDGES = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256, 2**15, 2**16, 2**29, 2**30, 2**31, 2**32 - 1]
EDGES += [2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 16, 2**64 - 1]


def good_fields() -> list[bytes]:
    """A file with every kind of value and a block tensor, field by field."""
    pairs = (
        raw_gguf.ARCHITECTURE,
        *malformed_model.keys().values(),
        pair(b"flag", BOOL, b"\1"),
        pair(b"scores", ARRAY, array(F32, 3, f32(1) + f32(2) + f32(3))),
        pair(b"bytes", ARRAY, array(U8, 4, b"abcd")),
        pair(b"template", STR, string("ünï".encode())),
    )
    infos = (raw_gguf.A, raw_gguf.B, info(b"q", (32, 2), raw_gguf.TENSOR_Q4_0, 64))
    data = raw_gguf.GOOD.data + bytes(range(36)) + bytes(28)
    return replace(raw_gguf.GOOD, pairs=pairs, infos=infos, data=data).fields()


def mutate(fields: list[bytes], rng: np.random.Generator) -> bytes:
    fields = list(fields)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(fields)))
        field = fields[at]
        how = int(rng.integers(8))
        if how < 4 and len(field) in (4, 8):  # an integer, most likely
            (old,) = struct.unpack("<I" if len(field) == 4 else "<Q", field)
            value = int(rng.choice(np.array([*EDGES, old + 1, old - 1], dtype=object)))
            fields[at] = (value % 2 ** (8 * len(field))).to_bytes(len(field), "little")
        elif how == 4 and field:
            bit = int(rng.integers(8 * len(field)))
            changed = bytearray(field)
            changed[bit // 8] ^= 1 << bit % 8
            fields[at] = bytes(changed)
        elif how == 5:
            fields[at] = field[: int(rng.integers(len(field) + 1))]
        elif how == 6:
            other = int(rng.integers(len(fields)))
            fields[at], fields[other] = fields[other], field
        else:
            fields.insert(at, fields[int(rng.integers(len(fields)))])
    raw = b"".join(fields)
    return raw[: int(rng.integers(len(raw) + 1))] if rng.random() < 0.05 else raw


def check(raw: bytes, directory: Path) -> bool:
    """Open the bytes as a file; return whether they were accepted."""
    path, again = directory / "x.gguf", directory / "again.gguf"
    path.write_bytes(raw)
    tracemalloc.reset_peak()
    start = time.perf_counter()
    try:
        file = open_gguf(path)
    except MalformedFile:
        file = None
    assert time.perf_counter() - start < MALFORMED_SECONDS
    assert tracemalloc.get_traced_memory()[1] < MALFORMED_MEMORY_BYTES
    if file is None:
        return False
    rewrite(file, again)
    second = open_gguf(again)
    assert list(second.values) == list(file.values)
    assert all(same_value(second.values[key], value) for key, value in file.values.items())
    for name, tensor in file.tensors.items():
        assert (second.tensors[name].shape, second.tensors[name].type) == (tensor.shape, tensor.type)
        assert second.read(name).tobytes() == file.read(name).tobytes()
    return True


def run(seeds: range, directory: Path, seconds: float = float("inf")) -> Counter[bool]:
    fields = good_fields()
    verdicts: Counter[bool] = Counter()
    tracemalloc.start()
    start = time.monotonic()
    try:
        assert check(b"".join(fields), directory)
        for seed in seeds:
            if time.monotonic() - start > seconds:
                break
            raw = mutate(fields, np.random.default_rng(seed))
            try:
                verdicts[check(raw, directory)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {raw!r}") from error
    finally:
        tracemalloc.stop()
    return verdicts


def test_mutations(tmp_path: Path) -> None:
    verdicts = run(range(SEEDS), tmp_path)
    assert verdicts.total() == SEEDS
    assert verdicts[True] > SEEDS // 50  # some do no harm: the mutator does not only break magic bytes
    assert verdicts[False] > SEEDS // 2


@pytest.mark.slow  # 30 s of fuzzing
def test_many_mutations(tmp_path: Path) -> None:
    assert run(range(SEEDS, 10**9), tmp_path, SLOW_SECONDS).total() > SEEDS
