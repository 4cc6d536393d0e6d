"""Speed and memory of one quantised product in onnxruntime: our library, function bodies, stock operators.

    scripts/bench_onnx.py                      the tables of docs/onnx-speed.md
    scripts/bench_onnx.py --tokens 1 --calls 1     one token, caches emptied by the other variants
    scripts/bench_onnx.py --tokens 1 --calls 1 --layers 32   time of one product among 32, as in a model
    scripts/bench_onnx.py --memory             resident memory: loading and running eight 4096 x 4096 layers

All variants of a size are sessions in one process, on one pool of threads, so that no session's threads
spin beside the next one's; one more is opened before them and not measured, because a process's first is 3
us slower than the others, whichever it is. They take turns in random order, `--rounds` times, and run
`--calls` times in each; the table shows medians of wall time, and how many times faster one variant is than
another, from one run. With one call a turn the others have emptied the caches; with ten, weights come from
the last level of cache if they fit. Before all that, results are held to each other. Inputs and outputs are
bound: between variants that empty the caches, handing numpy arrays to any operator and back costs some 50
us. Codes are random, of every layer its own; scales are fp16 and offsets (tau) 8-bit values, both widened
to float, as an export has them. NF4 and INT4 have offsets in the body and in the library; MatMulBnb4 and
MatMulNBits alone have none, so they do less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import decode_dq8, encode_dq8
from irq_formats.onnx.operators import DOMAIN, IR_VERSION, OPSETS, VERSION, Operator, function
from irq_formats.onnx.ops import CONTRIB, Ops
from irq_runtime import _native
from irq_runtime.onnx import register

T = TypeVar("T")

BLOCK = 64
#: name: (codebook, "library", "body" or a stock operator, its accuracy level)
VARIANTS: dict[str, tuple[str, str, int]] = {
    "nf4 library": ("nf4", "library", 0),
    "nf4 body": ("nf4", "body", 0),
    "MatMulBnb4": ("nf4", "MatMulBnb4", 0),
    "int4 library": ("int4", "library", 0),
    "int4 body": ("int4", "body", 0),
    "MatMulNBits acc 0": ("int4", "MatMulNBits", 0),
    "MatMulNBits acc 4": ("int4", "MatMulNBits", 4),
}
#: (name, baseline): what the ratios compare
RATIOS = (
    ("nf4 library", "MatMulBnb4"),
    ("nf4 library", "MatMulNBits acc 0"),
    ("nf4 library", "nf4 body"),
    ("int4 library", "MatMulNBits acc 0"),
    ("int4 library", "MatMulNBits acc 4"),
)


@dataclass(frozen=True)
class Row:
    """Median milliseconds of one product of one variant."""

    size: int
    threads: int
    tokens: int
    variant: str
    ms: float


def weights(codebook: str, size: int, layer: int) -> dict[str, NDArray[np.generic]]:
    """Codes, scale and tau of a random matrix ``(size, size)``. Every layer has its own: onnxruntime shares
    what it prepares of equal ones, which would then come from cache."""
    rng = np.random.default_rng(layer)
    nb = size // BLOCK
    mean_square = float(np.mean(np.square(CODEBOOKS[codebook].levels)))
    gain = (size * mean_square * 7 / 3) ** -0.5  # 7/3: of 1 to 2; outputs are of the inputs' size
    codes = rng.integers(0, 256, (size, nb, BLOCK // 2), dtype=np.uint8)
    scale = (1 + rng.random((size, nb), dtype=np.float32)) * rng.choice(np.float32([-gain, gain]), (size, nb))
    tau = rng.normal(0, 0.01 / size**0.5, (size, nb)).astype(np.float32)
    return {
        "codes": codes.reshape(size, -1) if codebook == "nf4" else codes,
        "scale": scale.astype(np.float16).astype(np.float32),
        "tau": decode_dq8(*encode_dq8(tau, with_mean=False)),
    }


def add_linear(ops: Ops, variant: str, size: int, a: ir.Value, layer: int) -> tuple[ir.Value, list[ir.Value]]:
    """One product with a random weight ``(size, size)``; returns its output and its initialisers."""
    codebook, how, accuracy = VARIANTS[variant]
    values = weights(codebook, size, layer)
    if how not in ("library", "body"):
        del values["tau"]
    if how == "MatMulBnb4":
        values = {key: value.reshape(-1) for key, value in values.items()}
    initialisers = [
        ir.Value(name=name, const_value=ir.Tensor(value, name=name))
        for name, value in ((f"layer{layer}.{key}", value) for key, value in values.items())
    ]
    shape = {"K": size, "N": size, "block_size": BLOCK}
    if how in ("library", "body"):
        op_type = Operator(codebook, BLOCK, has_tau=True).op_type
        return ops(op_type, a, *initialisers, domain=DOMAIN, codebook=codebook, **shape), initialisers
    extra = {"quant_type": 1} if how == "MatMulBnb4" else {"bits": 4, "accuracy_level": accuracy}
    return ops(how, a, *initialisers, domain=CONTRIB, **shape, **extra), initialisers


def write_model(path: Path, variant: str, size: int, layers: int = 1) -> None:
    """A chain of products, weights in an external file."""
    codebook, how, _ = VARIANTS[variant]
    ops, initialisers = Ops(), []
    value = a = ir.Value(name="A", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["M", size]))
    for layer in range(layers):
        value, added = add_linear(ops, variant, size, value, layer)
        initialisers += added
    value.name, value.type, value.shape = "Y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["M", size])
    opsets = {**OPSETS, DOMAIN: VERSION}
    graph = ir.Graph(
        [a], [value], nodes=ops.nodes, initializers=initialisers, opset_imports=opsets, name="bench"
    )
    functions = [function(Operator(codebook, BLOCK, has_tau=True))] if how in ("library", "body") else []
    model = ir.Model(graph, ir_version=IR_VERSION, functions=functions)
    ir.save(model, path, external_data=f"{path.name}.data")


def open_session(path: Path, variant: str) -> onnxruntime.InferenceSession:
    """A session on the threads that all sessions of this process share (`set_global_thread_pool_sizes`)."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    if VARIANTS[variant][1] == "library":
        register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check_agreement(sessions: dict[str, onnxruntime.InferenceSession], size: int, layers: int) -> None:
    """Library and body agree, and so do a single product of it less tau and the stock operator."""
    a = np.random.default_rng(1).normal(0, 1, (17, size)).astype(np.float32)
    results = {variant: session.run(None, {"A": a})[0] for variant, session in sessions.items()}
    pairs = {codebook: (f"{codebook} library", f"{codebook} body") for codebook in ("nf4", "int4")}
    if layers == 1:
        sums = a.reshape(17, -1, BLOCK).sum(axis=2)
        for codebook, stock in (("nf4", "MatMulBnb4"), ("int4", "MatMulNBits acc 0")):
            results[codebook] = results[f"{codebook} library"] - sums @ weights(codebook, size, 0)["tau"].T
            pairs[stock] = (codebook, stock)
    for what, (ours, theirs) in pairs.items():
        nmse = float(np.mean((results[ours] - results[theirs]) ** 2) / np.var(results[theirs]))
        if not nmse <= 1e-11 * layers:  # two float32 sums of 4096 terms, each up to 4096 * 2^-48 / 3, a layer
            raise SystemExit(f"{what}: results differ, NMSE {nmse}")


def bind(session: onnxruntime.InferenceSession, a: NDArray[np.float32]) -> Any:
    """``a`` as input, and memory for an output of its shape."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("A", onnxruntime.OrtValue.ortvalue_from_numpy(a))
    binding.bind_ortvalue_output("Y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(a)))
    return binding


def measure(
    folder: Path, size: int, threads: int, tokens: list[int], rounds: int, calls: int, layers: int
) -> list[Row]:
    """Rows of every number of tokens, with sessions of ``layers`` products. Once per process."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    paths = {variant: folder / f"{variant}-{size}.onnx".replace(" ", "-") for variant in VARIANTS}
    for variant, path in paths.items():
        if not path.exists():
            write_model(path, variant, size, layers)
    unmeasured, *opened = (open_session(paths[variant], variant) for variant in ("int4 body", *VARIANTS))
    unmeasured.run(None, {"A": np.zeros((1, size), np.float32)})
    sessions = dict(zip(VARIANTS, opened, strict=True))
    check_agreement(sessions, size, layers)
    shuffled = np.random.default_rng(2)
    rows = []
    for m in tokens:
        a = np.random.default_rng(1).normal(0, 1, (m, size)).astype(np.float32)
        bindings = {variant: bind(session, a) for variant, session in sessions.items()}
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(max(5, rounds if m < 64 else rounds // 4)):
            for variant in shuffled.permutation(list(VARIANTS)):  # who comes before decides what is in cache
                session, binding = sessions[variant], bindings[variant]
                for _ in range(calls):
                    begin = time.perf_counter()
                    session.run_with_iobinding(binding)
                    seconds[variant].append(time.perf_counter() - begin)
        ms = {variant: 1e3 * median(taken[1:]) / layers for variant, taken in seconds.items()}
        rows += [Row(size, threads, m, variant, value) for variant, value in ms.items()]
        show(rows[-len(ms) :])
    return rows


def show(rows: list[Row]) -> None:
    ms = {row.variant: row.ms for row in rows}
    ratios = [f"{ms[baseline] / ms[name]:.2f}" for name, baseline in RATIOS]
    head = [str(rows[0].size), str(rows[0].threads), str(rows[0].tokens)]
    print("|", " | ".join([*head, *(f"{value:.3g}" for value in ms.values()), *ratios]), "|", flush=True)


def resident_mib(field: str) -> float:
    """Resident memory now (VmRSS) or at its peak since it was last reset (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def memory(path: str, variant: str, size: int) -> tuple[float, float]:
    """Peak growth of resident memory by loading, and by running one token besides (MiB)."""
    onnxruntime.set_global_thread_pool_sizes(1, 1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_mib("VmRSS")
    session = open_session(Path(path), variant)
    loaded = resident_mib("VmHWM")
    session.run(None, {"A": np.zeros((1, size), np.float32)})
    return loaded - before, resident_mib("VmHWM") - before


def in_new_process(function: Callable[..., T], *args: object) -> T:
    """Call a function in a process that has no pool of threads yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def show_memory(folder: Path, size: int = 4096, layers: int = 8) -> None:
    print("| variant | file MiB | load | ratio | load and run | ratio |\n|---|---|---|---|---|---|")
    for variant in VARIANTS:
        path = folder / "memory.onnx"
        write_model(path, variant, size, layers)
        file = (folder / "memory.onnx.data").stat().st_size / 2**20
        load, run = in_new_process(memory, str(path), variant, size)
        print(
            f"| {variant} | {file:.0f} | {load:.0f} | {load / file:.2f} | {run:.0f} | {run / file:.2f} |",
            flush=True,
        )
        for written in (path, folder / "memory.onnx.data"):
            written.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048, 4096], help="K = N")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=31, help="a quarter of it from 64 tokens on")
    parser.add_argument("--calls", type=int, default=10, help="of a variant in its turn: 1 finds caches cold")
    parser.add_argument("--layers", type=int, default=1, help="products in a session, one after the other")
    parser.add_argument("--memory", action="store_true", help="measure memory, not speed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}, {_native.isa()}, milliseconds, medians\n")
    with tempfile.TemporaryDirectory() as name:
        if args.memory:
            return show_memory(Path(name))
        ratios = [f"{name} × {baseline}" for name, baseline in RATIOS]
        columns = ["K = N", "threads", "tokens", *VARIANTS, *ratios]
        print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
        rows: list[Row] = []
        for size, threads in product(args.sizes, args.threads):
            how = (args.tokens, args.rounds, args.calls, args.layers)
            rows += in_new_process(measure, Path(name), size, threads, *how)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return None


if __name__ == "__main__":
    main()
