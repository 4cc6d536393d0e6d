"""Soak ``irq-export serve``: clients that read, leave and err, and the server's memory over time.

Everything stays on the loopback address. Ends with 1 if the memory grew, a reply was wrong, a request was
left running or the server did not end cleanly. The server runs without glibc's per-thread caches and arenas:
they fill for minutes and would hide what is sought (``--allocator-caches`` leaves them on).

    python scripts/soak_serve.py model.gguf --seconds 180 --clients 8

The growth of the memory needs four samples: ``--every`` seconds apart, the first one not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

PROMPTS = (
    "Once upon a time",
    "The little dog ran to the park. " * 6,
    "A cat",
    "One day a girl named Lily " * 3,
)

#: Kinds of request, by the name of what they do.
KINDS = ("whole", "stream", "stream", "left", "timeout", "sampled", "chat", "scored", "refused", "malformed")

#: One of these is what "sampled" asks for besides a temperature.
FIELDS: tuple[dict[str, object], ...] = (
    {"top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 3},
    {"logprobs": 0, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"logit_bias": {"5": -100, "9": 1.5}, "min_p": 0.05, "n": 2, "stop": ["."]},
    {"ignore_eos": True, "max_tokens": -1, "repeat_penalty": 1.2},
    {"echo": True, "logprobs": 1},
)

#: One of these is what "chat" asks for.
CHAT_FIELDS: tuple[dict[str, object], ...] = (
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"enable_thinking": False}},
    {"logprobs": False, "max_tokens": 9},
)

#: The second half may use this much more than the first: some 60 bytes a request. Cycles wait for the garbage
#: collector, and the largest number of them that ever waited keeps its memory.
GROWTH_BYTES = 256 << 10

#: One arena, no thread caches: freed memory is used again at once, whichever thread frees it.
PLAIN_MALLOC = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


class Soak:
    """Clients of one server, and what they saw."""

    def __init__(self, url: str, seconds: float, max_tokens: int) -> None:
        self.url = url
        self.max_tokens = max_tokens
        self.seen: Counter[str] = Counter()
        self.tokens = 0
        self.wrong: list[str] = []
        self.lock = threading.Lock()
        with httpx.Client(base_url=url, timeout=600) as client:
            self.expected = {prompt: self.whole(client, prompt) for prompt in PROMPTS}
            self.scores = {prompt: self.scored(client, prompt) for prompt in PROMPTS}
        self.end = time.monotonic() + seconds

    def body(self, prompt: str, **fields: object) -> dict[str, object]:
        return {"prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0, **fields}

    @staticmethod
    def post(client: httpx.Client, path: str, body: dict[str, object]) -> dict[str, Any]:
        """Return the reply to a request that must be granted."""
        reply: dict[str, Any] = client.post(path, json=body).raise_for_status().json()
        return reply

    def whole(self, client: httpx.Client, prompt: str) -> str:
        return str(self.post(client, "/completions", self.body(prompt))["choices"][0]["text"])

    def scored(self, client: httpx.Client, prompt: str) -> str:
        """Return the log probabilities of a prompt, as a scorer of multiple choice asks for them."""
        body = self.body(prompt, echo=True, logprobs=1, max_tokens=1)
        return json.dumps(self.post(client, "/completions", body)["choices"][0]["logprobs"])

    def streamed(self, client: httpx.Client, prompt: str, leave_after: int | None) -> str | None:
        """Return the text, or None if the client left."""
        text = ""
        with client.stream("POST", "/completions", json=self.body(prompt, stream=True)) as reply:
            reply.raise_for_status()
            for count, line in enumerate(line for line in reply.iter_lines() if line):
                if line == "data: [DONE]":
                    return text
                if count == leave_after:
                    return None
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text + " (no end)"

    def request(self, client: httpx.Client, rng: random.Random) -> tuple[str, int]:
        """Make one request; return what kind it was and the tokens read."""
        prompt = rng.choice(PROMPTS)
        kind = rng.choice(KINDS)
        if kind == "whole":
            self.check(prompt, self.whole(client, prompt))
        elif kind == "stream":
            self.check(prompt, self.streamed(client, prompt, None) or "")
        elif kind == "left":
            self.streamed(client, prompt, rng.randrange(self.max_tokens // 2))
            return kind, 0
        elif kind == "timeout":
            try:
                body = self.body(prompt, n=4)
                client.post("/completions", json=body, timeout=rng.uniform(0.01, 0.3)).raise_for_status()
            except httpx.TimeoutException:
                return kind, 0
            return "in time", 4 * self.max_tokens
        elif kind == "sampled":
            body = self.body(prompt, temperature=1.1, **rng.choice(FIELDS))
            return kind, self.post(client, "/completions", body)["usage"]["completion_tokens"]
        elif kind == "chat":
            messages = [{"role": "user", "content": prompt}]
            body = {"messages": messages, "max_tokens": self.max_tokens, **rng.choice(CHAT_FIELDS)}
            return kind, self.post(client, "/chat/completions", body)["usage"]["completion_tokens"]
        elif kind == "scored":
            self.check(prompt, self.scored(client, prompt), self.scores[prompt])
            return kind, 1
        elif kind == "refused":
            for field in ({"prompt": [prompt] * 100}, {"logit_bias": {"99999999": 1}}, {"grammar": "x"}):
                reply = client.post("/completions", json=self.body(prompt) | field)
                self.check("refused", str(reply.status_code), "400")
            return kind, 0
        else:
            reply = client.post("/completions", content=rng.randbytes(200))
            self.check("malformed", str(reply.status_code), "400")
            return kind, 0
        return kind, self.max_tokens

    def check(self, what: str, got: str, expected: str | None = None) -> None:
        if got != (self.expected[what] if expected is None else expected):
            self.wrong.append(f"{what!r}: {got!r}")

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=600) as client:
            while time.monotonic() < self.end:
                try:
                    kind, tokens = self.request(client, rng)
                except Exception as error:  # noqa: BLE001  (whatever it is, it is wrong, and the client goes on)
                    self.wrong.append(repr(error))
                    continue
                with self.lock:
                    self.seen[kind] += 1
                    self.tokens += tokens


def resident(pid: int) -> int:
    """Memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def growth(samples: list[int]) -> int | None:
    """Median of the second half of the samples over that of the first, bytes; None of fewer than four."""
    if len(samples) < 4:
        return None
    half = len(samples) // 2
    return int(statistics.median(samples[half:]) - statistics.median(samples[1 : half + 1]))


def watch(pid: int, soak: Soak, every: float) -> list[int]:
    """Print and return the server's memory until the soak ends."""
    samples: list[int] = []
    start = time.monotonic()
    while time.monotonic() < soak.end:
        samples.append(resident(pid))
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        print(
            f"{time.monotonic() - start:6.0f} s  {samples[-1] / 2**20:7.1f} MiB  {threads:3} threads  "
            f"{files:3} files  {sum(soak.seen.values()):6} requests  {soak.tokens:8} tokens",
            flush=True,
        )
        time.sleep(every)
    return samples


def start(model: Path, options: list[str], allocator: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port; return it and its address."""
    environment = {**os.environ, **allocator}
    command = [sys.executable, "-m", "irq_export", "serve", str(model), "--port", "0", "--json", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    document = ""
    while process.stdout is not None and not document.endswith("\n}\n"):
        line = process.stdout.readline()
        if not line:
            sys.exit(f"the server did not start:\n{document}")
        document += line
    return process, json.loads(document)["url"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--every", type=float, default=10, help="seconds between samples")
    parser.add_argument("--allocator-caches", action="store_true", help="leave glibc as it is")
    args = parser.parse_args()
    allocator = {} if args.allocator_caches else PLAIN_MALLOC
    process, url = start(args.model, ["--threads", args.threads], allocator)
    try:
        soak = Soak(url, args.seconds, args.max_tokens)
        clients = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(args.clients)]
        for thread in clients:
            thread.start()
        samples = watch(process.pid, soak, args.every)
        for thread in clients:
            thread.join()
        time.sleep(1)
        state = httpx.get(url.removesuffix("/v1") + "/health").json()
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    finally:
        process.kill()
    grown = growth(samples)
    report = {
        "requests": dict(soak.seen),
        "tokens_per_s": round(soak.tokens / args.seconds, 1),
        "wrong": soak.wrong[:5],
        "left_running": state["running"] + state["waiting"],
        "exit_code": code,
        "rss_first_mib": round(samples[0] / 2**20, 1),
        "rss_last_mib": round(samples[-1] / 2**20, 1),
        "rss_growth_between_halves_mib": None if grown is None else round(grown / 2**20, 2),
    }
    print(json.dumps(report, indent=2))
    sys.exit(bool(soak.wrong or report["left_running"] or code or (grown or 0) > GROWTH_BYTES))


if __name__ == "__main__":
    main()
