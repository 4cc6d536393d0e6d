"""How fast a model runs here, and how near that is to the machine's limit.

Decoding reads every weight once per token, so its limit is the memory: a row of the result says how
many bytes a token costs and what share of the measured read bandwidth that is. Prompts are limited by
arithmetic and have no such number. Tokens are random and the same in every repetition, as in llama.cpp's
``llama-bench``; sampling and tokenising are not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from irq_formats.errors import UsageError
from irq_formats.gguf import open_gguf
from irq_formats.gguf.pair import model_files
from irq_runtime import _native
from irq_runtime.engine import Engine, EngineInfo
from irq_runtime.machine import peak_rss
from irq_runtime.model_file import check_context, read_config

__all__ = ["BenchReport", "BenchRow", "bench"]

_BANDWIDTH_BYTES = 256 << 20  # several times any last-level cache of a small machine
_BANDWIDTH_PASSES = 5


@dataclass(frozen=True)
class BenchRow:
    """One test.

    Attributes:
        name: ``pp512`` (a prompt of 512 tokens) or ``tg128`` (128 tokens, one by one).
        tokens: Tokens per repetition.
        seconds: Of every repetition.
        tokens_per_second: From the median repetition.
        bytes_per_token: Weights, adapters, keys and values read; None for prompts.
        bandwidth_share: Of the measured bandwidth, 0 to 1; None for prompts.
    """

    name: str
    tokens: int
    seconds: tuple[float, ...]
    tokens_per_second: float
    bytes_per_token: int | None
    bandwidth_share: float | None


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Attributes:
        model: The file, or the directory of a pair, as given.
        file_bytes: Its size.
        mode: ``exact`` or ``fast``.
        threads: Threads used.
        isa: Instruction set used.
        load_seconds: Opening the model.
        bandwidth: Bytes per second that the same threads read from memory.
        peak_rss_bytes: Largest resident size of this process until the last test, the file's pages included.
        rows: One a test.
    """

    model: str
    file_bytes: int
    mode: str
    threads: int
    isa: str
    load_seconds: float
    bandwidth: float
    peak_rss_bytes: int
    rows: tuple[BenchRow, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the fields, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """Return a table for people."""
        size, speed = self.file_bytes / 2**20, self.bandwidth / 1e9
        lines = [
            f"{self.model}: {size:.1f} MiB, {self.mode}, {self.threads} threads, {self.isa}",
            f"loaded in {self.load_seconds * 1e3:.0f} ms; memory reads {speed:.1f} GB/s",
            f"{'test':>8} {'tokens/s':>10} {'± %':>6} {'MB/token':>9} {'of bandwidth':>13}",
        ]
        for row in self.rows:
            spread = 100 * (max(row.seconds) - min(row.seconds)) / 2 / statistics.median(row.seconds)
            cost = "" if row.bytes_per_token is None else f"{row.bytes_per_token / 1e6:.1f}"
            share = "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}"
            lines.append(f"{row.name:>8} {row.tokens_per_second:>10.2f} {spread:>6.1f} {cost:>9} {share:>13}")
        return "\n".join(lines)


def bench(
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    mode: str = "exact",
    threads: int | None = None,
    prompt: Sequence[int] = (512,),
    generate: Sequence[int] = (128,),
    repetitions: int = 5,
    half_cache: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> BenchReport:
    """Measure a model.

    Args:
        model: GGUF that the native engine opens, or the directory of a stock pair.
        adapter: Separate adapter file.
        adapter_scale: Its multiplier.
        mode: ``exact`` or ``fast``.
        threads: Compute threads; None: the cores of this machine.
        prompt: Lengths of prompts to measure.
        generate: Numbers of generated tokens to measure.
        repetitions: Of every test, after one that is not counted.
        half_cache: Keep keys and values in fp16.
        progress: Called with (done, total, what) before every test.

    Raises:
        IrqError: The file, the adapter or an option is refused.
    """
    lengths = [*prompt, *generate]
    if not lengths or min(lengths) < 1 or repetitions < 1:
        raise UsageError("nothing to measure", expected="lengths and repetitions of 1 or more")
    path, adapter = model_files(model, adapter)
    check_context(read_config(open_gguf(path)), max(lengths))
    started = time.perf_counter()
    engine = Engine(
        path,
        adapter,
        adapter_scale,
        threads=threads,
        mode=mode,
        context=max(lengths),
        half_cache=half_cache,
    )
    load_seconds = time.perf_counter() - started
    tests = [("pp", n) for n in prompt] + [("tg", n) for n in generate]
    timed = []
    for done, (kind, count) in enumerate(tests):
        if progress is not None:
            progress(done, len(tests), f"{kind}{count}")
        timed.append((kind, count, _time(engine, kind, count, repetitions)))
    peak = peak_rss()  # before the buffer of the next line
    bandwidth = _native.read_bandwidth(engine.threads, _BANDWIDTH_BYTES, _BANDWIDTH_PASSES)
    return BenchReport(
        model=str(model),
        file_bytes=engine.info.file_bytes,
        mode=mode,
        threads=engine.threads,
        isa=engine.info.isa,
        load_seconds=load_seconds,
        bandwidth=bandwidth,
        peak_rss_bytes=peak,
        rows=tuple(_row(engine.info, *test, bandwidth) for test in timed),
    )


def _time(engine: Engine, kind: str, count: int, repetitions: int) -> tuple[float, ...]:
    """Return the seconds of every repetition but the first."""
    tokens = np.random.default_rng(0).integers(engine.info.vocab_size, size=count).tolist()
    steps = [tokens] if kind == "pp" else [[token] for token in tokens]
    seconds = []
    for _ in range(repetitions + 1):
        session = engine.session()
        started = time.perf_counter()
        for step in steps:
            session.next_logits(step)
        seconds.append(time.perf_counter() - started)
    return tuple(seconds[1:])


def _row(info: EngineInfo, kind: str, count: int, seconds: tuple[float, ...], bandwidth: float) -> BenchRow:
    rate = count / statistics.median(seconds)
    if kind == "pp":
        return BenchRow(f"pp{count}", count, seconds, rate, None, None)
    cached = info.sequence_bytes // info.context  # keys and values of one position
    cost = info.bytes_per_token + cached * (count + 1) // 2
    return BenchRow(f"tg{count}", count, seconds, rate, cost, cost * rate / bandwidth)
