"""The rows of bench_runtime.py: each is a process that keeps a model open and answers tests.

A row speaks JSON lines: a request {"kind", "count", "tokens"} on standard input, an answer {"rate", "busy",
"rss_bytes"} on standard output. So a row may run under another Python, which holds another build of
llama.cpp; nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[str, int, list[int]], float]  # kind, count, tokens: tokens per second
CONTEXT = 1024


@dataclass(frozen=True)
class Side:
    """One row: a runtime (ours | xllamacpp | llama_cpp), a file and how it is run."""

    name: str
    path: str
    runtime: str = "xllamacpp"
    mode: str = ""
    isa: str = ""
    python: str = sys.executable

    @property
    def ours(self) -> bool:
        return self.runtime == "ours"


@dataclass
class Result:
    """What one row gave with one number of threads; lists have one entry a round."""

    side: str
    ours: bool
    threads: int
    file_bytes: int
    load_s: float
    bytes_per_token: int
    build: str
    rss_bytes: int = 0
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens/s of each test
    busy: list[float] = field(default_factory=list)  # processor time / (wall time x threads)


def open_ours(side: Side, threads: int) -> tuple[Run, dict[str, Any]]:
    """Open a model in the native engine; return what runs a test, and facts."""
    from irq_runtime import _native
    from irq_runtime.engine import Engine

    _native.set_isa(side.isa)
    engine = Engine(side.path, threads=threads, mode=side.mode, context=CONTEXT)

    def run(kind: str, count: int, tokens: list[int]) -> float:
        session = engine.session()
        started = time.perf_counter()
        session.next_logits(tokens)
        if kind == "tg":  # tokens known beforehand, no sampling
            started = time.perf_counter()
            for _ in range(count):
                session.next_logits(tokens[:1])
        return count / (time.perf_counter() - started)

    return run, {"bytes_per_token": engine.info.bytes_per_token, "build": engine.info.isa}


def open_xllamacpp(side: Side, threads: int) -> tuple[Run, dict[str, Any]]:
    """The server of the wheel; its own timing of n + 1 generated tokens covers n steps."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = side.path
    params.n_ctx, params.n_parallel, params.fit_params = CONTEXT, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity, params.ui, params.cache_ram_mib, params.n_ctx_checkpoints = 0, False, 0, 0
    server = xllamacpp.Server(params)

    def run(kind: str, count: int, tokens: list[int]) -> float:
        body = {"prompt": tokens, "n_predict": count + 1 if kind == "tg" else 1, "ignore_eos": True}
        body |= {"temperature": 0.0, "samplers": ["temperature"], "cache_prompt": False}
        timings = server.handle_completions(body)["timings"]
        return float(timings["prompt_per_second" if kind == "pp" else "predicted_per_second"])

    return run, {"bytes_per_token": 0, "build": xllamacpp.get_system_info().strip()}


def open_llama_cpp(side: Side, threads: int) -> tuple[Run, dict[str, Any]]:
    """llama-cpp-python: bare `llama_decode`, no sampling, tokens known beforehand."""
    import llama_cpp

    model = llama_cpp.Llama(
        side.path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False, flash_attn=True
    )

    def run(kind: str, count: int, tokens: list[int]) -> float:
        model.reset()
        started = time.perf_counter()
        model.eval(tokens)
        if kind == "tg":
            started = time.perf_counter()
            for _ in range(count):
                model.eval(tokens[:1])
        return count / (time.perf_counter() - started)

    return run, {"bytes_per_token": 0, "build": llama_cpp.llama_print_system_info().decode().strip()}


OPENERS = {"ours": open_ours, "xllamacpp": open_xllamacpp, "llama_cpp": open_llama_cpp}


def resident() -> int:
    """Bytes of this process in memory, the pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(side: Side, threads: int) -> None:
    """Child process: answer tests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that log to standard output must not disturb
    before, started = resident(), time.perf_counter()
    run, facts = OPENERS[side.runtime](side, threads)
    first = {"load_s": time.perf_counter() - started, **facts}
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        rate = run(**json.loads(line))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        reply = {"rate": rate, "busy": cpu / wall / threads, "rss_bytes": resident() - before}
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)  # llama.cpp's threads have nothing to save


class Row:
    """A row's process, seen from the bench."""

    def __init__(self, side: Side, threads: int) -> None:
        command = [side.python, __file__, json.dumps(asdict(side)), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        size = Path(side.path).stat().st_size
        self.result = Result(side.name, side.ours, threads, size, **self._answer())

    def measure(self, kind: str, count: int, tokens: list[int], *, keep: bool) -> None:
        """Run a test; record it if `keep`."""
        if self.process.stdin is None:
            raise RuntimeError(f"{self.result.side} has no standard input")
        request = {"kind": kind, "count": count, "tokens": tokens}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        if keep:
            self.result.rates.setdefault(f"{kind}{count}", []).append(answer["rate"])
            self.result.busy.append(answer["busy"])
            self.result.rss_bytes = max(self.result.rss_bytes, answer["rss_bytes"])

    def close(self) -> None:
        self.process.communicate(timeout=20)

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"a row died: {self.process.args}")
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    serve(Side(**json.loads(sys.argv[1])), int(sys.argv[2]))
