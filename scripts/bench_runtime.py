"""Tokens per second of the native runtime next to stock llama.cpp, and what each row costs in quality.

    python scripts/bench_runtime.py --ours nf4=../speed/nf4.gguf int4=../speed/int4.gguf --work ../speed \\
        --f32 ../smollm2/f32.gguf --text ../shared/data/wikitext2/wiki.test.raw --name SmolLM2-135M
    python scripts/bench_runtime.py --ours nf4=../speed/7b-nf4.gguf --peers Q4_0=../speed/7b-Q4_0.gguf \\
        --tests pp128 tg32 --work ../speed --name 7b

Every row is a process of its own that stays open (_runtime_rows.py); the rows are visited in turn, `--rounds`
times, and the medians are shown, so that a slow minute of the machine hits all of them. Ours decodes known
tokens through `Engine`, logits to Python included (float32 cache); llama.cpp is the server of the wheel
`xllamacpp` with its own defaults (fp16 cache, repacked weights, flash attention as it likes) and its own
`timings`, and, with --llama-python, another build in another environment, through bare `llama_decode` of
known tokens. A ratio compares, round by round, with the fastest row of llama.cpp whose file is at most a
tenth larger than ours, a share of bandwidth what the last tg test reads with what the memory gave before that
round. The peers' files are made here from --f32 (`irq-export quantize --exclude '*'`, then `to-gguf --merge
f32`), embedding in Q8_0 as llama-quantize does; types that gguf-py cannot quantise, as IQ4_NL and Q4_K_M, are
given as TYPE=FILE. With --text quality is measured too; files of random bytes (make_synthetic.py) have none.
Each run writes its tables under its --name into --output; the others there are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _runtime_rows import Result, Row, Side
from _stamp import stamp

from irq_export.parity.llamacpp import LlamaCpp
from irq_export.parity.metrics import log_softmax
from irq_formats.gguf import open_gguf
from irq_runtime import _native
from irq_runtime.engine import Engine
from irq_runtime.tokenizer import load_tokenizer

POSITIONS = 128  # of quality
EQUAL_BITS = 1.1  # a peer's file may be this many times larger


def can_make(kind: str) -> bool:
    """Whether the `gguf` package quantises to this type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    try:
        quantize(np.zeros((1, 256), np.float32), GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError):
        return False
    return True


def make_peer(source: Path, target: Path, kind: str) -> None:
    """Quantise a float32 GGUF with the `gguf` package; nothing if the target is there."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import quantize

    if target.exists():
        return
    partial = target.with_suffix(".partial")
    reader, writer = GGUFReader(source), GGUFWriter(partial, "llama")
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
    partial.rename(target)


def speed(
    sides: list[Side], threads: int, tests: list[tuple[str, int]], rounds: int, seconds: float
) -> dict[str, Any]:
    """All rows in turn, and the memory bandwidth of these threads, bytes/s, before every counted round."""
    end = time.monotonic() + seconds
    rows: list[Row] = []
    bandwidth: list[float] = []
    rng = np.random.default_rng(0)
    vocabulary = int(str(open_gguf(sides[0].path).metadata["irq.model.vocab_size"]))
    try:
        rows.extend(Row(side, threads) for side in sides)  # those of before are kept if one fails
        for turn in range(-1, rounds):  # the first is not counted
            if turn > 0 and time.monotonic() > end:
                break
            if turn >= 0:
                bandwidth.append(_native.read_bandwidth(threads, 256 << 20, 3))
            for kind, count in tests:
                tokens = rng.integers(256, min(vocabulary, 32000), count if kind == "pp" else 1).tolist()
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
    found = {}
    for side in sides:
        key = json.dumps([side.name, *map(stamp, (Path(side.path), f32, text))])
        if key in done:
            found[side.name] = done[key]
            continue
        if side.ours:
            _native.set_isa(side.isa)
            session = Engine(side.path, mode=side.mode, context=POSITIONS).session()
            logits = np.stack([session.next_logits([token]) for token in tokens])
        else:
            with LlamaCpp(side.path, threads=2, ctx=POSITIONS) as server:
                logits = server.logprobs(tokens)
        kl = (np.exp(teacher) * (teacher - log_softmax(logits))).sum(axis=1)
        found[side.name] = done[key] = [float(kl.mean()), float(kl.std(ddof=1) / np.sqrt(len(kl)))]
        print(f"KL {side.name}: {done[key]}", flush=True)
        cache.write_text(json.dumps(done, indent=1))
    return found


def table(part: dict[str, Any], quality: dict[str, list[float]]) -> list[str]:
    """One table, as lines of Markdown."""
    rows = [Result(**row) for row in part["rows"]]
    tests = list(rows[0].rates)
    decoding = [test for test in tests if test.startswith("tg")]
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
        share = 0.0
        if decoding:
            shares = [
                rate / read for rate, read in zip(row.rates[decoding[-1]], part["bandwidth"], strict=True)
            ]
            share = row.bytes_per_token * statistics.median(shares)
        cells += [f"{share:.0%}" if share else "", f"{row.load_s * 1e3:.0f}", f"{row.rss_bytes / 2**20:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{statistics.median(row.busy):.0%}'])} |")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The section of a run."""
    lines = [f"## {report['name']}", "", f"    {report['command']}", "", f"{report['date'][:10]}.", ""]
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
        path = given
        if not given:
            source = hashlib.sha256(json.dumps(stamp(args.f32)).encode()).hexdigest()[:8]
            path = str(args.work / f"peer-{kind}-{source}.gguf")
            make_peer(args.f32, Path(path), kind)
        sides.append(Side(f"llama.cpp {kind}", path))
        if args.llama_python:
            sides.append(Side(f"llama.cpp {kind}, other build", path, "llama_cpp", python=args.llama_python))
    return sides


def checked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, after what would else fail behind the first measurements."""
    args = parser.parse_args(arguments)
    made = [item for item in args.peers if "=" not in item]
    if not all("=" in item for item in args.ours):
        parser.error("--ours: NAME=FILE")
    if made and args.f32 is None:
        parser.error(f"the files of {', '.join(made)} are made from --f32, or named: TYPE=FILE")
    for kind in made:
        if not can_make(kind):
            parser.error(f"gguf-py cannot quantise to {kind}: give a file of llama-quantize, {kind}=FILE")
    if args.text and args.f32 is None:
        parser.error("--text needs --f32: quality is a distance from the unquantised model")
    named = [item.partition("=")[2] for item in [*args.ours, *args.peers] if "=" in item]
    for path in (args.f32, args.text, *map(Path, named)):
        if path is not None and not path.is_file():
            parser.error(f"{path} is not there")
    for test in args.tests:
        if not re.fullmatch(r"(pp|tg)[1-9]\d*", test):
            parser.error(f"{test}: a test is pp128 (a prompt) or tg128 (generation), of any length")
    for folder in (args.work, args.json.parent, args.output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed of the native runtime next to llama.cpp.")
    parser.add_argument(
        "--ours", nargs="+", required=True, metavar="NAME=FILE", help="irq GGUFs of one model"
    )
    parser.add_argument("--peers", nargs="+", default=["Q4_0", "Q4_1", "Q8_0"], metavar="TYPE[=FILE]")
    parser.add_argument("--f32", type=Path, help="the unquantised model, stock GGUF: peers are made from it")
    parser.add_argument("--text", type=Path, help="measures quality too, on the beginning of this text")
    parser.add_argument("--work", type=Path, required=True, help="where the peers' files go")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python, for another build")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tests", nargs="+", default=["pp128", "pp512", "tg128"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30, help="no new round after, for each --threads")
    parser.add_argument("--name", required=True, help="heads the section")
    parser.add_argument("--json", type=Path, default=Path("build/runtime-speed.json"))
    parser.add_argument("--output", type=Path, default=Path("build/runtime-speed.md"))
    args = checked(parser, arguments)

    sides = sides_of(args)
    start, tests = os.getloadavg()[0], [(test[:2], int(test[2:])) for test in args.tests]
    parts = [speed(sides, threads, tests, args.rounds, 60 * args.minutes) for threads in args.threads]
    report: dict[str, Any] = {
        "name": args.name,
        "command": shlex.join([f"scripts/{Path(__file__).name}", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "load": [start, os.getloadavg()[0]],
        "parts": parts,
        "quality": {},
    }
    args.json.write_text(json.dumps(report, indent=1))
    if args.text:
        report["quality"] = quality(sides, args.f32, args.text, args.work / "quality.json")
        args.json.write_text(json.dumps(report, indent=1))
    old = (
        args.output.read_text() if args.output.exists() else "# Speed: the native runtime next to llama.cpp\n"
    )
    args.output.write_text(replace_section(old, args.name, markdown(report)))


if __name__ == "__main__":
    main()
