"""Tokens per second of the native runtime next to stock llama.cpp, and what each row costs in quality.

    scripts/bench_runtime.py --f32 ../smollm2/f32.gguf --ours nf4=../speed/nf4.gguf int4=../speed/int4.gguf \\
        --text ../shared/data/wikitext2/wiki.test.raw --work ../speed

Every row is a process of its own that stays open; the rows are visited in turn, `--rounds` times, and the
medians are shown, so that a slow minute of the machine hits all of them. Neighbours take processor time
away, so a second table gives tokens per second of processor time and thread: on an idle machine the two
agree. Ours generates greedily through `Engine`, arg-max included; llama.cpp is the server of the wheel
`xllamacpp` with its own defaults (fp16 cache, repacked weights, flash attention as it likes), and its own
`timings` are taken. The peers' files are made here from the float32 one, embedding in Q8_0 as
llama-quantize does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from irq_export.parity.llamacpp import LlamaCpp
from irq_export.parity.metrics import log_softmax
from irq_formats.gguf import open_gguf
from irq_runtime import _native
from irq_runtime.engine import Engine
from irq_runtime.tokenizer import load_tokenizer

Run = Callable[[str, int, list[int]], float]  # kind, count, tokens: tokens per second
TESTS = (("pp", 128), ("pp", 512), ("tg", 64))  # a prompt of n tokens, n generated tokens
CONTEXT = 1024
POSITIONS = 128


@dataclass(frozen=True)
class Side:
    """One row: a runtime, a file and how it is run."""

    name: str
    path: Path
    mode: str = ""  # empty: llama.cpp
    isa: str = ""


@dataclass
class Result:
    """What one row gave with one number of threads; lists have one entry a round."""

    side: str
    threads: int
    load_seconds: float
    bytes_per_token: int
    isa: str
    rss_bytes: int = 0
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens/s of each test
    busy: dict[str, list[float]] = field(default_factory=dict)

    def rounds(self, test: str, *, processor: bool) -> list[float]:
        """Tokens per second of the clock, or of processor time and thread."""
        pairs = zip(self.rates[test], self.busy[test], strict=True)
        return [rate / busy if processor else rate for rate, busy in pairs]


def make_peer(source: Path, target: Path, kind: str) -> None:
    """Quantise a float32 GGUF with the `gguf` package; nothing if the target is there."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import quantize

    if target.exists():
        return
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = value.types[1] if len(value.types) > 1 else None
            writer.add_key_value(key, value.contents(), value.types[0], inner)
    for tensor in reader.tensors:
        matrix = tensor.data.ndim == 2
        name = "Q8_0" if tensor.name == "token_embd.weight" else kind if matrix else "F32"
        ggml = GGMLQuantizationType[name]
        writer.add_tensor(tensor.name, quantize(tensor.data, ggml) if matrix else tensor.data, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def resident() -> int:
    """Bytes of this process in memory, the pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_ours(side: Side, threads: int) -> tuple[Run, dict[str, Any]]:
    """Open a model in the native engine; return what runs a test, and facts."""
    _native.set_isa(side.isa)
    engine = Engine(side.path, threads=threads, mode=side.mode, context=CONTEXT)

    def run(kind: str, count: int, tokens: list[int]) -> float:
        session = engine.session()
        started = time.perf_counter()
        logits = session.next_logits(tokens)
        if kind == "tg":
            started = time.perf_counter()
            for _ in range(count):
                logits = session.next_logits([int(logits.argmax())])
        return count / (time.perf_counter() - started)

    return run, {"bytes_per_token": engine.info.bytes_per_token, "isa": engine.info.isa}


def open_peer(side: Side, threads: int) -> tuple[Run, dict[str, Any]]:
    """The same in llama.cpp, whose timing of n + 1 generated tokens covers n steps."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(side.path)
    params.n_ctx, params.n_parallel, params.fit_params = CONTEXT, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity, params.ui, params.cache_ram_mib, params.n_ctx_checkpoints = 0, False, 0, 0
    server = xllamacpp.Server(params)

    def run(kind: str, count: int, tokens: list[int]) -> float:
        body = {"prompt": tokens, "n_predict": count + 1 if kind == "tg" else 1, "ignore_eos": True}
        body |= {"temperature": 0.0, "samplers": ["temperature"], "cache_prompt": False}
        timings = server.handle_completions(body)["timings"]
        return float(timings["prompt_per_second" if kind == "pp" else "predicted_per_second"])

    return run, {"bytes_per_token": 0, "isa": xllamacpp.get_system_info().strip()}


def work(pipe: Connection, side: Side, threads: int) -> None:
    """Child process: answer tests until told to stop."""
    before, started = resident(), time.perf_counter()
    run, facts = (open_ours if side.mode else open_peer)(side, threads)
    pipe.send({"load_seconds": time.perf_counter() - started, **facts})
    while (request := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        rate = run(*request)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send((rate, cpu / wall / threads, resident() - before))
    os._exit(0)  # llama.cpp's threads have nothing to save


class Worker:
    """A row's process."""

    def __init__(self, side: Side, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, side, threads))
        self.process.start()
        theirs.close()
        self.result = Result(side.name, threads, **self.pipe.recv())

    def measure(self, test: tuple[str, int], tokens: list[int], *, keep: bool) -> None:
        """Run a test and record it unless it is the first."""
        self.pipe.send((*test, tokens))
        rate, busy, rss = self.pipe.recv()
        if keep:
            name = f"{test[0]}{test[1]}"
            self.result.rates.setdefault(name, []).append(rate)
            self.result.busy.setdefault(name, []).append(busy)
            self.result.rss_bytes = max(self.result.rss_bytes, rss)

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(10)


def speed(sides: list[Side], threads: int, rounds: int, minutes: float) -> tuple[list[Result], float]:
    """All rows in turn; also the memory bandwidth of these threads, bytes/s."""
    end = time.monotonic() + 60 * minutes
    workers, bandwidths = [Worker(side, threads) for side in sides], []
    rng = np.random.default_rng(0)
    try:
        for turn in range(-1, rounds):  # the first is not counted
            if turn > 0 and time.monotonic() > end:
                break
            bandwidths.append(_native.read_bandwidth(threads, 256 << 20, 3))
            for test in TESTS if turn >= 0 else TESTS[::2]:
                tokens = rng.integers(256, 49152, test[1] if test[0] == "pp" else 1).tolist()
                for worker in workers:
                    worker.measure(test, tokens, keep=turn >= 0)
            print(f"threads {threads}, round {turn + 1}, load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    return [worker.result for worker in workers], max(bandwidths)


def quality(sides: list[Side], f32: Path, text: Path, cache: Path) -> dict[str, list[float]]:
    """KL(float32 || row) of decode steps, nats: mean and standard error. Slow for llama.cpp: cached."""
    done: dict[str, list[float]] = json.loads(cache.read_text()) if cache.exists() else {}
    tokenizer = load_tokenizer(open_gguf(sides[0].path))  # ours carry it
    tokens = tokenizer.encode(text.read_text()[:8000], add_special=False)[:POSITIONS]
    teacher = log_softmax(Engine(f32, mode="exact", context=POSITIONS).logits(tokens))
    for side in sides:
        if side.name in done:
            continue
        if side.mode:
            _native.set_isa(side.isa)
            session = Engine(side.path, mode=side.mode, context=POSITIONS).session()
            logits = np.stack([session.next_logits([token]) for token in tokens])
        else:
            with LlamaCpp(side.path, threads=2, ctx=POSITIONS) as server:
                logits = server.logprobs(tokens)
        kl = (np.exp(teacher) * (teacher - log_softmax(logits))).sum(axis=1)
        done[side.name] = [float(kl.mean()), float(kl.std(ddof=1) / np.sqrt(len(kl)))]
        print(f"KL {side.name}: {done[side.name]}", flush=True)
        cache.write_text(json.dumps(done, indent=1))
    return done


def table(report: dict[str, Any], threads: int, *, processor: bool) -> list[str]:
    """One table, as lines of Markdown."""
    tests = [f"{kind}{count}" for kind, count in TESTS]
    heads = ["row", "MiB", "KL", *(head for test in tests for head in (test, "x"))]
    heads += ["of bandwidth", "load, ms", "RSS, MiB", "busy"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rows = [Result(**row) for row in report["results"] if row["threads"] == threads]
    base = next(row for row in rows if row.side == "llama.cpp Q4_0")
    for row in rows:
        kl, error = report["quality"][row.side]
        cells = [row.side, f"{report['bytes'][row.side] / 2**20:.0f}", f"{kl:.2g} ± {error:.0g}"]
        for test in tests:
            found = row.rounds(test, processor=processor)
            ratios = [a / b for a, b in zip(found, base.rounds(test, processor=processor), strict=True)]
            cells += [f"{statistics.median(found):.0f}", f"{statistics.median(ratios):.2f}"]
        share = row.bytes_per_token * statistics.median(found) / report["bandwidth"][str(threads)]
        busy = statistics.median(value for values in row.busy.values() for value in values)
        cells += [f"{share:.0%}" if share else "", f"{row.load_seconds * 1e3:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{row.rss_bytes / 2**20:.0f}', f'{busy:.0%}'])} |")
    return [*lines, ""]


def markdown(report: dict[str, Any]) -> str:
    """The part of docs/runtime-speed.md above its reading."""
    lines = [
        "# Speed: the native runtime next to llama.cpp\n",
        "Made by `scripts/bench_runtime.py` (method in its docstring): SmolLM2-135M, tokens/s, median of",
        f"{report['rounds']} or more interleaved rounds on a shared machine of {os.cpu_count()} processors,",
        "load average {:.1f} at the start, {:.1f} at the end. `pp n`: a prompt of n".format(*report["load"]),
        "tokens; `tg n`: n generated tokens; x: times llama.cpp Q4_0, median of the rounds' ratios; busy:",
        "share of its processors that the row got. KL(float32 ‖ row) in nats with its standard error, over",
        f"{POSITIONS} positions of wikitext-2 (test). llama.cpp: {report['peer']}.\n",
    ]
    for threads, bandwidth in report["bandwidth"].items():
        gb = f"memory reads {bandwidth / 1e9:.1f} GB/s"
        for processor, what in ((False, f"by the clock ({gb})"), (True, "by processor time")):
            lines.append(f"## Threads: {threads}, {what}\n")
            lines += table(report, int(threads), processor=processor)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the native runtime next to llama.cpp.")
    parser.add_argument("--f32", type=Path, required=True, help="the unquantised model, stock GGUF")
    parser.add_argument("--ours", nargs="+", required=True, metavar="NAME=FILE", help="irq GGUFs of it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the peers' files go")
    parser.add_argument("--peers", nargs="+", default=["Q4_0", "Q4_1", "Q8_0"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30, help="no new round after, for each --threads")
    parser.add_argument("--json", type=Path, default=Path("build/runtime-speed.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/runtime-speed.md"))
    args = parser.parse_args()

    sides, best = [], _native.isa()
    variants = ((best, "fast"), (best, "exact"), ("avx2", "fast"))
    for item, (isa, mode) in product(args.ours, dict.fromkeys(variants)):
        name, path = item.split("=", 1)
        sides.append(Side(f"{name} {mode}, {isa}", Path(path), mode, isa))
    for kind in args.peers:
        path = args.work / f"peer-{kind}.gguf"
        make_peer(args.f32, path, kind)
        sides.append(Side(f"llama.cpp {kind}", path))

    start = os.getloadavg()[0]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes": {side.name: side.path.stat().st_size for side in sides},
        "bandwidth": {},
        "results": [],
    }
    for threads in args.threads:
        rows, report["bandwidth"][str(threads)] = speed(sides, threads, args.rounds, args.minutes)
        report["results"] += [asdict(row) for row in rows]
        report["peer"] = rows[-1].isa
        report["rounds"] = min(len(row["rates"]["tg64"]) for row in report["results"])
        report["load"] = [start, os.getloadavg()[0]]
        args.json.write_text(json.dumps(report, indent=1))
    report["quality"] = quality(sides, args.f32, args.text, args.work / "quality.json")
    args.json.write_text(json.dumps(report, indent=1))
    old = args.output.read_text() if args.output.exists() else ""
    reading = old[old.index("## Reading") :] if "## Reading" in old else ""
    args.output.write_text(markdown(report) + ("\n" + reading if reading else ""))


if __name__ == "__main__":
    main()
