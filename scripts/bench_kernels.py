"""Speed of the native kernels, one weight at a time: GB/s of weight bytes and GFLOP/s.

    scripts/bench_kernels.py                        the tables of runtime/src/kernels/README.md
    scripts/bench_kernels.py --formats nf4 q4_0 --isas avx512 --tokens 1 --json out.json

Sizes: `cache` (4096 columns, as many rows as make 0.5 MiB, which stays in L2) shows the kernel, `memory`
(49152 x 4096, each product reads it anew) shows what decoding a large model sees, `prefill` (1024 x 1024) is
for many tokens, `narrow` (1024 x 576) as SmolLM2's. The f32
row in `memory` is the ceiling: its kernel has nothing to do but read. Random codes. Times are processor
seconds of each thread, the slowest counts; the variants of a weight are visited in turn, `--rounds` times,
and the best is shown: on a shared machine the rest measures the neighbours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.gguf.types import GgmlType
from irq_runtime import _native
from irq_runtime.kernels import block_weight, stock_weight

SIZES = {"cache": (0, 4096), "memory": (49152, 4096), "prefill": (1024, 1024), "narrow": (1024, 576)}
CACHE_BYTES = 1 << 19
ROW_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32}
#: name: (codebook, block size, storage of scale and of tau)
BLOCKS = {
    **{name: (name, 64, "dq8", "dq8") for name in ("nf4", "nf3", "nf2", "int4", "int3", "int2")},
    "nf4/32": ("nf4", 32, "dq8", "dq8"),
    "nf4 f16": ("nf4", 64, "f16", "f16"),
    "nf4 f32": ("nf4", 64, "f32", "f32"),
    "int8": ("int8", 32, "f16", "none"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    size: str
    format: str
    isa: str
    mode: str
    tokens: int
    threads: int
    bits_per_weight: float
    gb_per_s: float
    gflop_per_s: float


def weight_of(name: str, shape: tuple[int, int]) -> _native.Weight:
    rng = np.random.default_rng(0)
    rows, columns = shape
    if name in ROW_BYTES:
        raw = rng.integers(0, 60, (rows, int(columns * ROW_BYTES[name])), dtype=np.uint8)  # finite halves
        return stock_weight(raw, GgmlType[name.upper()], columns)
    spec = BlockSpec(*BLOCKS[name])
    parts = {}
    for part, (dtype, size) in part_layout(spec, shape).items():
        integers = dtype in (np.uint8, np.int8)
        parts[part] = (
            rng.integers(0, 256, size, dtype=np.uint8).view(dtype) if integers else np.full(size, 0.01, dtype)
        )
    return block_weight(BlockTensor(spec, shape, parts))


def shape_of(size: str, name: str) -> tuple[int, int]:
    """Rows and columns; `cache` has as many rows as CACHE_BYTES hold."""
    rows, columns = SIZES[size]
    return rows or 256 * CACHE_BYTES // weight_of(name, (256, columns)).nbytes, columns


def seconds(weight: _native.Weight, tokens: int, mode: str, threads: int, least: float) -> float:
    """Seconds per product: repeats until `least` seconds have passed."""
    repeats = 1
    while True:
        passed = max(weight.time(tokens, mode, repeats, threads))
        if passed >= least or repeats >= 1 << 20:
            return passed / repeats
        repeats = max(repeats + 1, int(repeats * 1.2 * least / max(passed, 1e-9)))


def measure(
    weight: _native.Weight,
    shape: tuple[int, int],
    size: str,
    name: str,
    threads: int,
    variants: list[tuple[str, str, int]],
    rounds: int,
    least: float,
) -> Iterator[Row]:
    """All variants (isa, mode, tokens) of one weight, in turn, `rounds` times; the best of each."""
    times: dict[tuple[str, str, int], list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for isa, mode, tokens in variants:
            _native.set_isa(isa)
            times[isa, mode, tokens].append(seconds(weight, tokens, mode, threads, least))
    weights = shape[0] * shape[1]
    for (isa, mode, tokens), taken in times.items():
        gb, gflop = 1e-9 * weight.nbytes / min(taken), 2e-9 * weights * tokens / min(taken)
        yield Row(size, name, isa, mode, tokens, threads, 8 * weight.nbytes / weights, gb, gflop)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=[*BLOCKS, *ROW_BYTES])
    parser.add_argument("--isas", nargs="+", default=["avx512", "avx2", "dotprod", "neon", "scalar"])
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.01, help="least time of one measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    isas = [isa for isa in args.isas if _native.isa_supported(isa)]
    variants = [*product(isas, args.modes, args.tokens)]
    rows: list[Row] = []
    print(
        f"{'size':8}{'format':9}{'isa':8}{'mode':6}{'tokens':>7}{'threads':>8}{'bpw':>7}{'GB/s':>8}{'GFLOP/s':>9}"
    )
    for size, name in product(args.sizes, args.formats):
        shape = shape_of(size, name)
        weight = weight_of(name, shape)
        for threads in args.threads:
            for row in measure(weight, shape, size, name, threads, variants, args.rounds, args.seconds):
                rows.append(row)
                print(
                    f"{row.size:8}{row.format:9}{row.isa:8}{row.mode:6}{row.tokens:7}{row.threads:8}"
                    f"{row.bits_per_weight:7.2f}{row.gb_per_s:8.2f}{row.gflop_per_s:9.1f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()
