"""The HTTP server: real requests over loopback against the model that ships in the package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from irq_formats.errors import UsageError
from irq_formats.gguf import open_gguf
from irq_runtime.completion import complete
from irq_runtime.engine import Engine
from irq_runtime.sampling import SamplingParams
from irq_runtime.serve.generation import Done, Event, Generation
from irq_runtime.serve.options import ServeOptions
from irq_runtime.serve.scheduler import Scheduler
from irq_runtime.tokenizer import load_tokenizer
from tests.serving import running_server

PROMPT = "Once upon a time"
LONG = "Once upon a time there was a cat. The cat had a big red ball. One day the ball was gone. " * 3
CHUNK = 16

Json = dict[str, Any]


@pytest.fixture(scope="module")
def demo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from irq_export.export.gguf import to_gguf
    from irq_export.quantize_model import quantize

    folder = tmp_path_factory.mktemp("serve")
    quantize(repo / "irq_export" / "demo_model", folder / "checkpoint", codebook="nf4", refine="none")
    to_gguf(folder / "checkpoint", folder / "demo.gguf", profile="irq")
    return folder / "demo.gguf"


@contextmanager
def client_of(demo: Path, **options: Any) -> Iterator[httpx.Client]:
    with (
        running_server(demo, ServeOptions(port=0, model_name="demo", **{"chunk": CHUNK, **options})) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(demo: Path) -> Iterator[httpx.Client]:
    with client_of(demo) as client:
        yield client


def post(client: httpx.Client, path: str = "completions", **body: Any) -> Json:
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(client: httpx.Client, **body: Any) -> str:
    return post(client, **{"prompt": PROMPT, **body})["choices"][0]["text"]


def events_of(client: httpx.Client, path: str, **body: Any) -> list[Json]:
    """Documents of a stream, which must end in [DONE]."""
    with client.stream("POST", f"/v1/{path}", json={"stream": True, **body}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def is_idle(client: httpx.Client) -> bool:
    state = client.get("/health").json()
    return (state["running"], state["waiting"]) == (0, 0)


class TestCompletions:
    def test_greedy_is_what_run_says(self, client: httpx.Client, demo: Path) -> None:
        expected = complete(model=demo, prompt=PROMPT, max_tokens=48)
        reply = post(client, prompt=PROMPT, max_tokens=48, temperature=0)
        assert reply["choices"] == [
            {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": expected.finish_reason}
        ]
        assert reply["usage"]["prompt_tokens"] == len(expected.prompt_tokens)
        assert reply["usage"]["completion_tokens"] == len(expected.tokens)
        assert (reply["object"], reply["model"]) == ("text_completion", "demo")

    def test_long_prompts_are_read_in_chunks(self, client: httpx.Client, demo: Path) -> None:
        expected = complete(model=demo, prompt=LONG, max_tokens=24)
        assert len(expected.prompt_tokens) > 4 * CHUNK
        assert text_of(client, prompt=LONG, max_tokens=24, temperature=0) == expected.text

    def test_tokens_as_prompt(self, client: httpx.Client, demo: Path) -> None:
        expected = complete(model=demo, prompt=PROMPT, max_tokens=12)
        options = {"max_tokens": 12, "temperature": 0}
        assert text_of(client, prompt=expected.prompt_tokens, **options) == expected.text
        two = post(client, prompt=[expected.prompt_tokens, [5, 6]], **options)["choices"]
        assert [choice["index"] for choice in two] == [0, 1]
        assert two[0]["text"] == expected.text != two[1]["text"]

    def test_stop_strings(self, client: httpx.Client) -> None:
        whole = text_of(client, max_tokens=48, temperature=0)
        word = whole.split()[5]
        reply = post(client, prompt=PROMPT, max_tokens=48, temperature=0, stop=["never met", word])
        assert reply["choices"][0]["text"] == whole[: whole.index(word)]
        assert reply["choices"][0]["finish_reason"] == "stop"

    def test_seeds(self, client: httpx.Client) -> None:
        def run(**seed: int) -> str:
            return text_of(client, max_tokens=24, temperature=1.2, top_p=0.95, **seed)

        assert run(seed=7) == run(seed=7)
        assert len({run(seed=seed) for seed in range(-2, 2)}) == 4
        assert run() != run()

    def test_sampling_is_that_of_run(self, client: httpx.Client, demo: Path) -> None:
        options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1}
        expected = complete(model=demo, prompt=PROMPT, max_tokens=24, seed=3, **options)
        assert text_of(client, max_tokens=24, seed=3, **options) == expected.text

    def test_copies_count_their_prompt_once(self, client: httpx.Client) -> None:
        reply = post(client, prompt=PROMPT, max_tokens=8, temperature=1.5, seed=0, n=3, stop=None)
        assert len({choice["text"] for choice in reply["choices"]}) == 3
        assert reply["choices"][1]["text"] == text_of(client, max_tokens=8, temperature=1.5, seed=1)
        assert reply["usage"]["prompt_tokens"] == post(client, prompt=PROMPT)["usage"]["prompt_tokens"]

    def test_logprobs(self, client: httpx.Client) -> None:
        choice = post(client, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)["choices"][0]
        shown = choice["logprobs"]
        assert "".join(shown["tokens"]) == choice["text"]
        for logprob, top in zip(shown["token_logprobs"], shown["top_logprobs"], strict=True):
            assert len(top) == 3
            assert logprob == max(top.values()) <= 0


class TestChat:
    MESSAGES = ({"role": "user", "content": PROMPT},)

    def test_whole(self, client: httpx.Client, demo: Path) -> None:
        expected = complete(model=demo, prompt=PROMPT, max_tokens=20, chat=True)
        reply = post(
            client, "chat/completions", messages=self.MESSAGES, max_completion_tokens=20, temperature=0
        )
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
        assert reply["object"] == "chat.completion"

    def test_text_parts(self, client: httpx.Client) -> None:
        parts = [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]
        first, second = (
            post(client, "chat/completions", messages=messages, max_tokens=8, temperature=0)["choices"]
            for messages in (self.MESSAGES, [{"role": "user", "content": parts}])
        )
        assert first == second

    def test_logprobs(self, client: httpx.Client) -> None:
        options = {"messages": self.MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "seed": 1}
        choice = post(client, "chat/completions", **options)["choices"][0]
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
        chunks = events_of(client, "chat/completions", **options)
        streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [entry for part in streamed if part for entry in part["content"]] == entries

    def test_defaults_to_the_rest_of_the_context(self, client: httpx.Client) -> None:
        reply = post(client, "chat/completions", messages=self.MESSAGES, temperature=0)
        assert reply["usage"]["total_tokens"] == 512 or reply["choices"][0]["finish_reason"] == "stop"


class TestStreams:
    @pytest.mark.parametrize("path", ["completions", "chat/completions"])
    def test_equal_whole_replies(self, client: httpx.Client, path: str) -> None:
        body = {
            "prompt": PROMPT,
            "messages": TestChat.MESSAGES,
            "max_tokens": 40,
            "temperature": 0.8,
            "seed": 5,
        }
        whole = post(client, path, **body)
        chunks = events_of(client, path, **body, stream_options={"include_usage": True})
        *parts, usage = chunks
        assert len(parts) > 20
        assert usage["choices"] == []
        assert {**usage["usage"], "prompt_tokens_details": 0} == {
            **whole["usage"],
            "prompt_tokens_details": 0,
        }
        choices = [part["choices"][0] for part in parts]
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
        assert len({part["id"] for part in parts}) == 1
        if path == "completions":
            assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        else:
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            assert text == whole["choices"][0]["message"]["content"]

    def test_copies_are_told_apart(self, client: httpx.Client) -> None:
        body = {"prompt": PROMPT, "max_tokens": 10, "seed": 2, "n": 2}
        whole = [choice["text"] for choice in post(client, **body)["choices"]]
        texts = ["", ""]
        for chunk in events_of(client, "completions", **body):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == whole


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


class TestCancellation:
    HEAVY = {"prompt": PROMPT, "max_tokens": 500, "n": 16, "temperature": 1.3}  # noqa: RUF012

    def test_a_stream_that_is_left(self, demo: Path) -> None:
        with client_of(demo, sequences=2) as client:
            with client.stream("POST", "/v1/completions", json={**self.HEAVY, "stream": True}) as reply:
                lines = reply.iter_lines()  # its end closes the connection
                next(lines)
                assert not is_idle(client)
            start = time.monotonic()
            wait_until(lambda: is_idle(client))
            assert time.monotonic() - start < 2
            assert text_of(client, max_tokens=4)

    def test_a_reply_nobody_waits_for(self, demo: Path) -> None:
        with client_of(demo, sequences=2) as client:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=self.HEAVY, timeout=0.3)
            wait_until(lambda: is_idle(client))
            assert text_of(client, max_tokens=4)


BAD_BODIES: dict[str, tuple[str | bytes, str]] = {
    "not json": ("{", "not JSON"),
    "not utf-8": (b'{"prompt": "\xff"}', ""),
    "nothing": ("", "Field required"),
    "a list": ("[]", "valid dictionary"),
    "deep": ("[" * 100_000, ""),
    "huge number": ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", ""),
    "no prompt": ("{}", "prompt: Field required"),
    "number": ('{"prompt": 1}', "prompt"),
    "empty list": ('{"prompt": []}', "no prompt"),
    "empty prompt": ('{"prompt": [[]]}', "prompt is empty"),
    "unknown token": ('{"prompt": [1024]}', "no such token"),
    "negative token": ('{"prompt": [-1]}', "no such token"),
    "booleans": ('{"prompt": [true]}', "prompt"),
    "half a character": ('{"prompt": "\\ud800"}', "surrogate"),
    "half a name": ('{"prompt": "x", "model": "\\ud800"}', "surrogate"),
    "nan": ('{"prompt": "x", "temperature": NaN}', "temperature"),
    "temperature": ('{"prompt": "x", "temperature": -1}', "temperature"),
    "top_p": ('{"prompt": "x", "top_p": 0}', "top_p"),
    "penalty": ('{"prompt": "x", "repetition_penalty": 1e-300}', "repetition_penalty"),
    "no tokens": ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
    "copies": ('{"prompt": "x", "n": 1000}', "n: "),
    "long stop": ('{"prompt": "x", "stop": "' + "x" * 300 + '"}', "stop"),
    "tools": ('{"prompt": "x", "tools": [{}]}', "tools is not supported"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", BAD_BODIES)
    def test_bad_bodies(self, client: httpx.Client, name: str) -> None:
        body, message = BAD_BODIES[name]
        headers = {"content-type": "application/json"}
        reply = client.post("/v1/completions", content=body, headers=headers)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]

    @pytest.mark.parametrize(
        "messages",
        [[], [{}], [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "hello"],
        ids=str,
    )
    def test_bad_messages(self, client: httpx.Client, messages: object) -> None:
        reply = client.post("/v1/chat/completions", json={"messages": messages})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "messages"

    def test_other_paths_and_models(self, client: httpx.Client) -> None:
        assert client.get("/v1/engines").json()["error"]["message"] == "Not Found"
        assert client.get("/v1/completions").status_code == 405
        reply = client.post("/v1/completions", json={"prompt": "x", "model": "gpt"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
        assert client.get("/v1/models/demo").json()["id"] == "demo"
        assert client.get("/v1/models/other").status_code == 404

    def test_requests_a_web_page_could_send(self, client: httpx.Client) -> None:
        """A form's content type needs no preflight; a name pointed at this machine needs no CORS."""
        for headers in ({"content-type": "text/plain"}, {}):
            reply = client.post("/v1/completions", content='{"prompt": "x"}', headers=headers)
            assert reply.status_code == 400
        for host in ("localhost.evil.example", "127.0.0.1.evil.example:8000", "evil.example", "::1.evil", ""):
            rebound = client.get("/v1/models", headers={"host": host})
            assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "bad_host")
        for host in ("localhost", "LOCALHOST:80", "127.0.0.2:8000", "[::1]:8000"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        origin = client.get("/v1/models", headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in origin.headers

    def test_size_of_the_body(self, demo: Path) -> None:
        with client_of(demo, max_body=1000) as client:
            large = json.dumps({"prompt": "x" * 1000}).encode()
            for content in (large, iter([large[:600], large[600:]])):
                headers = {"content-type": "application/json"}
                reply = client.post("/v1/completions", content=content, headers=headers)
                assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")

    def test_a_body_that_never_comes(self, demo: Path) -> None:
        def slow() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)

        with client_of(demo, body_timeout_s=0.2) as client:
            assert client.post("/v1/completions", content=slow()).status_code == 408

    @pytest.mark.parametrize(("limit", "prompt"), [(None, [5] * 512), (20, [5] * 21)])
    def test_length_of_the_prompt(self, demo: Path, limit: int | None, prompt: list[int]) -> None:
        with client_of(demo, max_prompt=limit) as client:
            reply = client.post("/v1/completions", json={"prompt": prompt})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert post(client, prompt=prompt[1:], max_tokens=50)["usage"]["completion_tokens"] >= 1

    def test_without_a_queue_one_after_the_other_is_served(self, demo: Path) -> None:
        with client_of(demo, sequences=1, queue=0) as client:
            for _ in range(50):
                post(client, prompt=PROMPT, max_tokens=1)

    def test_length_of_the_queue(self, demo: Path) -> None:
        with client_of(demo, sequences=1, queue=15) as client:
            body = {**TestCancellation.HEAVY, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                refused = client.post("/v1/completions", json={"prompt": PROMPT, "n": 2})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            wait_until(lambda: is_idle(client))
            assert text_of(client, max_tokens=2)

    def test_key(self, demo: Path) -> None:
        with client_of(demo, api_key="secret") as client:
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                reply = client.get("/v1/models", headers=given)
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
            assert client.get("/health").status_code == 200

    def test_a_file_that_changes(self, demo: Path, tmp_path: Path) -> None:
        """The requests under way fail, without telling paths; the server stays."""
        copy = tmp_path / "m.gguf"
        copy.write_bytes(demo.read_bytes())
        with client_of(copy) as client:
            assert text_of(client, max_tokens=2)
            os.utime(copy, (0, 0))
            reply = client.post("/v1/completions", json={"prompt": PROMPT})
            assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
            assert str(tmp_path) not in reply.text
            assert "error" in events_of(client, "completions", prompt=PROMPT)[-1]
            wait_until(lambda: is_idle(client))

    @pytest.mark.parametrize(
        "options", [{"port": -1}, {"sequences": 0}, {"api_key": ""}, {"queue": -1}], ids=str
    )
    def test_bad_options(self, options: Json) -> None:
        with pytest.raises(UsageError):
            ServeOptions(**options)


class TestCommand:
    @contextmanager
    def started(self, demo: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
        command = [sys.executable, "-m", "irq_export", "serve", str(demo), "--json", "--port", "0", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        with process:
            try:
                assert process.stdout is not None
                lines = iter(process.stdout.readline, "")
                ready = ""
                while not ready.endswith("}\n"):
                    line = next(lines)
                    ready += line if line != "}\n" else "}\n"
                url = json.loads(ready)["url"]
                with httpx.Client(base_url=url.removesuffix("/v1"), timeout=60) as client:
                    yield process, client
            finally:
                process.kill()

    def test_sigterm_lets_requests_finish(self, demo: Path) -> None:
        with self.started(demo) as (process, client):
            body = {"prompt": PROMPT, "max_tokens": 200, "stream": True, "seed": 1}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in (
                "length",
                "stop",
            )
            assert process.wait(10) == 0

    def test_sigterm_ends_what_takes_too_long(self, demo: Path) -> None:
        with self.started(demo, "--grace", "0.2", "--sequences", "1") as (process, client):
            body = {**TestCancellation.HEAVY, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
            assert process.wait(10) == 0

    def test_port_in_use(self, demo: Path, client: httpx.Client) -> None:
        arguments = ["serve", str(demo), "--port", str(client.base_url.port)]
        done = subprocess.run(
            [sys.executable, "-m", "irq_export", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "cannot listen" in done.stderr

    def test_imports_no_torch(self) -> None:
        program = (
            "import sys, irq_runtime.serve.server, irq_export.cli.serve\n"
            "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


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
                        body = {**TestCancellation.HEAVY, "n": 2, "stream": True}
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
