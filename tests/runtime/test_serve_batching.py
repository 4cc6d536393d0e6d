"""The HTTP server, several clients: texts do not depend on each other; who leaves frees a place."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from irq_formats.errors import IrqError, MalformedFile
from irq_formats.gguf import open_gguf
from irq_runtime.engine import Engine
from irq_runtime.sampling import SamplingParams
from irq_runtime.serve.generation import Done, Event, Generation
from irq_runtime.serve.scheduler import Scheduler
from irq_runtime.tokenizer import Tokenizer, load_tokenizer
from tests.serving import CHUNK, HEAVY, LONG, PROMPT, client_of, is_idle, post, text_of, wait_until


class TestTogether:
    REQUESTS = (
        {"prompt": PROMPT, "max_tokens": 60, "temperature": 0},
        {"prompt": LONG, "max_tokens": 40, "temperature": 0},
        {"prompt": "The little dog", "max_tokens": 80, "temperature": 1.0, "seed": 1},
        {"prompt": LONG[40:], "max_tokens": 30, "temperature": 0.7, "seed": 2, "logprobs": 2},
    )

    def test_clients_get_what_they_get_alone(self, client: httpx.Client) -> None:
        """To the bit: the log probabilities too."""
        alone = [post(client, **request)["choices"] for request in self.REQUESTS]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                together = list(pool.map(lambda request: post(client, **request)["choices"], self.REQUESTS))
                assert together == alone

    def test_more_requests_than_sequences(self, client: httpx.Client) -> None:
        alone = text_of(client, max_tokens=20, temperature=0)
        with ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(lambda _: text_of(client, max_tokens=20, temperature=0), range(12)))
        assert set(texts) == {alone}

    def test_texts_share_passes(self, demo: Path) -> None:
        """Four texts of 40 tokens take 40 passes over the weights, and a few while prompts are read."""
        widths: list[int] = []

        class Counting(Engine):
            def step_each(self, tokens: Sequence[int], caches: Sequence[Any]) -> Any:
                widths.append(len(tokens))
                return super().step_each(tokens, caches)

        scheduler = Scheduler(Counting(demo, threads=1), load_tokenizer(open_gguf(demo)), chunk=CHUNK)
        ended = threading.Semaphore(0)

        def emit(index: int, event: Event) -> None:
            if isinstance(event, Done):
                ended.release()

        params = SamplingParams(max_tokens=40)
        scheduler.submit([Generation(tuple(range(5, 5 + n)), params) for n in (1, 9, 17, 40)], emit)
        for _ in range(4):
            assert ended.acquire(timeout=30)
        scheduler.close()
        assert sum(widths) == 160
        assert max(widths) == 4
        assert len(widths) < 50

    def test_shared_beginnings_are_read_once(self, demo: Path) -> None:
        with client_of(demo, sequences=1) as client:
            body = {"prompt": LONG, "max_tokens": 12, "temperature": 0, "logprobs": 2}
            first, again = post(client, **body), post(client, **body)
            shorter = post(client, **{**body, "prompt": LONG[:130]})
        cached = [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in (first, again, shorter)]
        assert cached[0] == 0
        assert cached[1] == (first["usage"]["prompt_tokens"] - 1) // CHUNK * CHUNK
        assert 0 < cached[2] < cached[1]
        assert again["choices"] == first["choices"]

    def ends_of(self, engine: Engine, tokenizer: Tokenizer, prompts: Sequence[tuple[int, ...]]) -> list[Done]:
        """How texts after prompts end that are generated together; the scheduler must outlive it."""
        scheduler = Scheduler(engine, tokenizer, chunk=CHUNK)
        ends: dict[int, Done] = {}
        ended = threading.Semaphore(0)

        def emit(index: int, event: Event) -> None:
            if isinstance(event, Done):
                ends[index] = event
                ended.release()

        params = SamplingParams(max_tokens=1, temperature=1.0)
        scheduler.submit([Generation(prompt, params) for prompt in prompts], emit)
        for _ in prompts:
            assert ended.acquire(timeout=30)
        state = scheduler.load().state
        scheduler.close()
        assert state in ("ok", "failed")
        return [ends[index] for index in range(len(prompts))]

    def test_a_model_that_computes_nan_fails_its_requests_only(self, demo: Path) -> None:
        class Broken(Engine):
            def step_each(self, tokens: Sequence[int], caches: Sequence[Any]) -> Any:
                logits = super().step_each(tokens, caches)
                logits[np.array(tokens) == 7] = np.nan
                return logits

        ends = self.ends_of(Broken(demo, threads=1), load_tokenizer(open_gguf(demo)), [(5, 7), (5, 6)])
        assert isinstance(ends[0].error, MalformedFile)
        assert ends[1].error is None

    def test_a_bug_fails_its_requests_only(self, demo: Path) -> None:
        tokenizer = load_tokenizer(open_gguf(demo))
        decode = tokenizer.decode

        def broken(ids: Sequence[int], skip_special: bool = True) -> str:
            if 7 in ids:
                raise ZeroDivisionError
            return decode(ids, skip_special)

        tokenizer.decode = broken  # type: ignore[method-assign]
        ends = self.ends_of(Engine(demo, threads=1), tokenizer, [(5, 7), (5, 6)])
        assert type(ends[0].error) is IrqError
        assert ends[1].error is None

    def test_a_bug_in_a_pass_fails_that_pass_only(self, demo: Path) -> None:
        class Broken(Engine):
            def step_each(self, tokens: Sequence[int], caches: Sequence[Any]) -> Any:
                raise ZeroDivisionError

        ends = self.ends_of(Broken(demo, threads=1), load_tokenizer(open_gguf(demo)), [(5, 7), (5, 6)])
        assert [type(end.error) for end in ends] == [IrqError, IrqError]


class Slow(Engine):
    """Passes that take long: HEAVY would take 80 s."""

    passes = 0

    def step(self, tokens: Sequence[int], cache: Any) -> Any:
        Slow.passes += 1
        time.sleep(0.1)
        return super().step(tokens, cache)

    def step_each(self, tokens: Sequence[int], caches: Sequence[Any]) -> Any:
        time.sleep(0.02)
        return super().step_each(tokens, caches)


class TestCancellation:
    """Idle again within the 20 s of `wait_until`, so not because the work was done."""

    def test_a_stream_that_is_left(self, demo: Path) -> None:
        with client_of(demo, engine=Slow, sequences=2) as client:
            with client.stream("POST", "/v1/completions", json={**HEAVY, "stream": True}) as reply:
                lines = reply.iter_lines()  # its end closes the connection
                next(lines)
                assert not is_idle(client)
            wait_until(lambda: is_idle(client))
            assert text_of(client, max_tokens=4)

    def test_a_reply_nobody_waits_for(self, demo: Path) -> None:
        with client_of(demo, engine=Slow, sequences=2) as client:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=HEAVY, timeout=0.3)
            wait_until(lambda: is_idle(client))
            assert text_of(client, max_tokens=4)

    def test_a_prompt_that_is_being_read(self, demo: Path) -> None:
        """31 chunks of it, with log probabilities."""
        Slow.passes = 0
        body = {"prompt": [5] * 500, "max_tokens": 1, "echo": True, "logprobs": 0}
        with client_of(demo, engine=Slow) as client:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
            wait_until(lambda: is_idle(client))
        assert 0 < Slow.passes < 31

    def test_a_request_that_waits(self, demo: Path) -> None:
        with client_of(demo, engine=Slow, sequences=1) as client:
            body = {**HEAVY, "n": 1, "stream": True}  # 10 s
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=HEAVY, timeout=0.3)
                wait_until(lambda: client.get("/health").json()["waiting"] == 0)
                assert client.get("/health").json()["running"] == 1


@pytest.mark.slow  # 20 s of load
def test_soak(demo: Path) -> None:
    """Clients that come, leave and err; afterwards the server does what it did before."""
    with client_of(demo, sequences=3, queue=8) as client:
        expected = text_of(client, max_tokens=20, temperature=0)
        end = time.monotonic() + 20
        wrong: list[str] = []

        def work(index: int) -> None:
            turn = 0
            while time.monotonic() < end:
                turn += 1
                try:
                    if (turn + index) % 3 == 0:
                        body = {**HEAVY, "n": 2, "stream": True}
                        with client.stream("POST", "/v1/completions", json=body) as reply:
                            lines = reply.iter_lines()
                            next(lines)
                    else:
                        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
                        reply = client.post("/v1/completions", json=body)
                        if reply.status_code == 200 and reply.json()["choices"][0]["text"] != expected:
                            wrong.append(reply.text)
                except httpx.HTTPError as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        wait_until(lambda: is_idle(client))
