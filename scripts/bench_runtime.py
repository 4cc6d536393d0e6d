"""Tokens per second of the native runtime next to stock llama.cpp, and what each row costs in quality.

    scripts/bench_runtime.py --ours nf4=../speed/nf4.gguf int4=../speed/int4.gguf --f32 ../smollm2/f32.gguf \\
        --text ../shared/data/wikitext2/wiki.test.raw --work ../speed --llama-python ../llama/venv/bin/python
    scripts/bench_runtime.py --ours nf4=../speed/7b-nf4.gguf --peers Q4_0=../speed/7b-Q4_0.gguf \\
        --tests pp128 tg32 --name 7b --work ../speed

Every row is a process of its own that stays open (runtime_rows.py); the rows are visited in turn, `--rounds`
times, and the medians are shown, so that a slow minute of the machine hits all of them. Ours decodes known
tokens through `Engine`, logits to Python included (float32 cache); llama.cpp is the server of the wheel
`xllamacpp` with its own defaults (fp16 cache, repacked weights, flash attention as it likes) and its own
`timings`, and, with --llama-python, another build in another environment, through bare `llama_decode` of
known tokens. A ratio compares, round by round, with the fastest row of llama.cpp whose file is at most a
tenth larger than ours, a share of bandwidth with what the memory gave before that round. With --f32 the files
of the peers are made here, embedding in Q8_0 as llama-quantize does, and quality is measured; files of random
bytes (make_synthetic.py) have none. Each run writes its tables under its --name; the others are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from runtime_rows import Result, Row, Side

from irq_export.parity.llamacpp import LlamaCpp
from irq_export.parity.metrics import log_softmax
from irq_formats.gguf import open_gguf
from irq_runtime import _native
from irq_runtime.engine import Engine
from irq_runtime.tokenizer import load_tokenizer

POSITIONS = 128  # of quality
EQUAL_BITS = 1.1  # a peer's file may be this many times larger


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


def speed(
    sides: list[Side], threads: int, tests: list[tuple[str, int]], rounds: int, seconds: float
) -> dict[str, Any]:
    """All rows in turn, and the memory bandwidth of these threads, bytes/s, before every counted round."""
    end = time.monotonic() + seconds
    rows: list[Row] = []
    bandwidth: list[float] = []
    rng = np.random.default_rng(0)
    try:
        rows += [Row(side, threads) for side in sides]
        for turn in range(-1, rounds):  # the first is not counted
            if turn > 0 and time.monotonic() > end:
                break
            if turn >= 0:
                bandwidth.append(_native.read_bandwidth(threads, 256 << 20, 3))
            for kind, count in tests:
                tokens = rng.integers(256, 32000, count if kind == "pp" else 1).tolist()
                for row in rows:
                    row.measure(kind, count if turn >= 0 else min(count, 16), tokens, keep=turn >= 0)
            print(f"threads {threads}, round {turn + 1}, load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        for row in rows:
            row.close()
    return {"threads": threads, "bandwidth": bandwidth, "rows": [asdict(row.result) for row in rows]}


def quality(sides: list[Side], f32: Path, text: Path, cache: Path) -> dict[str, list[float]]:
    """KL(float32 || row) of decode steps, nats: mean and standard error. Slow for llama.cpp: cached."""
    done: dict[str, list[float]] = json.loads(cache.read_text()) if cache.exists() else {}
    tokenizer = load_tokenizer(open_gguf(sides[0].path))  # ours carry it
    tokens = tokenizer.encode(text.read_text()[:8000], add_special=False)[:POSITIONS]
    teacher = log_softmax(Engine(f32, mode="exact", context=POSITIONS).logits(tokens))
    for side in sides:
        if side.name in done:
            continue
        if side.ours:
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


def table(part: dict[str, Any], quality: dict[str, list[float]]) -> list[str]:
    """One table, as lines of Markdown."""
    rows = [Result(**row) for row in part["rows"]]
    tests = list(rows[0].rates)
    heads = ["row", "MiB", *(["KL"] if quality else []), *(head for test in tests for head in (test, "x"))]
    heads += ["of bandwidth", "load, ms", "RSS, MiB", "busy"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.side, f"{row.file_bytes / 2**20:.0f}"]
        if quality:
            cells.append("{:.2g} ± {:.0g}".format(*quality[row.side]))
        peers = [peer for peer in rows if not peer.ours and peer.file_bytes <= EQUAL_BITS * row.file_bytes]
        for test in tests:
            cells.append(f"{statistics.median(row.rates[test]):.4g}")
            best = [max(rates) for rates in zip(*(peer.rates[test] for peer in peers), strict=True)]
            ratios = [rate / peer for rate, peer in zip(row.rates[test], best, strict=True)] if peers else []
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        shares = [rate / read for rate, read in zip(row.rates[tests[-1]], part["bandwidth"], strict=True)]
        share = row.bytes_per_token * statistics.median(shares)
        cells += [f"{share:.0%}" if share else "", f"{row.load_s * 1e3:.0f}", f"{row.rss_bytes / 2**20:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{statistics.median(row.busy):.0%}'])} |")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The section of a run."""
    lines = [f"## {report['name']}", ""]
    for part in report["parts"]:
        builds = {row["build"] for row in part["rows"] if not row["ours"]}
        rounds = min(len(rates) for row in part["rows"] for rates in row["rates"].values())
        lines += [
            f"{report['cpu']}, threads: {part['threads']}, median of {rounds} rounds.",
            "Memory reads {:.1f} GB/s. ".format(statistics.median(part["bandwidth"]) / 1e9)
            + "Load average {:.1f} before, {:.1f} after.".format(*report["load"]),
            "",
            *table(part, report["quality"]),
            "",
        ]
    return "\n".join([*lines, *(f"llama.cpp: `{build}`" for build in sorted(builds)), ""])


def replace_section(text: str, name: str, section: str) -> str:
    """Put a section in the place of the one of the same name, or before the reading."""
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(text):
        return pattern.sub(lambda _: section + "\n", text)
    head, mark, reading = text.partition("## Reading")
    return f"{head.rstrip()}\n\n{section}\n{mark}{reading}"


def processor() -> str:
    """The name of the processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'unknown processor'}, {os.cpu_count()} processors"


def sides_of(args: argparse.Namespace) -> list[Side]:
    """The rows that the arguments ask for; makes the peers' files that are missing."""
    sides, best = [], _native.isa()
    for item, (isa, mode) in product(args.ours, ((best, "fast"), (best, "exact"), ("avx2", "fast"))):
        name, path = item.split("=", 1)
        sides.append(Side(f"{name} {mode}, {isa}", path, "ours", mode, isa))
    for item in args.peers:
        kind, _, given = item.partition("=")
        path = given or str(args.work / f"peer-{kind}.gguf")
        if not given:
            make_peer(args.f32, Path(path), kind)
        sides.append(Side(f"llama.cpp {kind}", path))
        if args.llama_python:
            sides.append(Side(f"llama.cpp {kind}, other build", path, "llama_cpp", python=args.llama_python))
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the native runtime next to llama.cpp.")
    parser.add_argument(
        "--ours", nargs="+", required=True, metavar="NAME=FILE", help="irq GGUFs of one model"
    )
    parser.add_argument("--peers", nargs="+", default=["Q4_0", "Q4_1", "Q8_0"], metavar="TYPE[=FILE]")
    parser.add_argument("--f32", type=Path, help="the unquantised model, stock GGUF")
    parser.add_argument("--text", type=Path, help="for quality")
    parser.add_argument("--work", type=Path, required=True, help="where the peers' files go")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python, for another build")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tests", nargs="+", default=["pp128", "pp512", "tg128"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30, help="no new round after, for each --threads")
    parser.add_argument("--name", default="SmolLM2-135M")
    parser.add_argument("--json", type=Path, default=Path("build/runtime-speed.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/runtime-speed.md"))
    args = parser.parse_args()

    sides = sides_of(args)
    start, tests = os.getloadavg()[0], [(test[:2], int(test[2:])) for test in args.tests]
    parts = [speed(sides, threads, tests, args.rounds, 60 * args.minutes) for threads in args.threads]
    report: dict[str, Any] = {
        "name": args.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "load": [start, os.getloadavg()[0]],
        "parts": parts,
        "quality": {},
    }
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1))
    if args.f32:
        report["quality"] = quality(sides, args.f32, args.text, args.work / "quality.json")
        args.json.write_text(json.dumps(report, indent=1))
    old = (
        args.output.read_text() if args.output.exists() else "# Speed: the native runtime next to llama.cpp\n"
    )
    args.output.write_text(replace_section(old, args.name, markdown(report)))


if __name__ == "__main__":
    main()
