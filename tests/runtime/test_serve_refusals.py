"""What the HTTP server refuses, and that it stays up."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from irq_formats.errors import UsageError
from irq_runtime.serve.options import ServeOptions
from irq_runtime.tokenizer import Tokenizer
from tests.serving import HEAVY, PROMPT, Json, client_of, events_of, is_idle, post, text_of, wait_until

BAD_BODIES: dict[str, tuple[str | bytes, str]] = {
    "not json": ("{", "not JSON"),
    "not utf-8": (b'{"prompt": "\xff"}', ""),
    "nothing": ("", "Field required"),
    "a list": ("[]", "valid dictionary"),
    "deep": ("[" * 100_000, ""),
    "huge number": ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", ""),
    "no prompt": ("{}", "prompt: Field required"),
    "number": ('{"prompt": 1}', "prompt: Input"),
    "empty list": ('{"prompt": []}', "no prompt"),
    "empty prompt": ('{"prompt": [[]]}', "prompt is empty"),
    "unknown token": ('{"prompt": [1024]}', "no such token"),
    "negative token": ('{"prompt": [-1]}', "no such token"),
    "booleans": ('{"prompt": [1, true]}', "prompt.0.1: Input should be a valid integer"),
    "an object": ('{"prompt": ["a", {}]}', "prompt.1: Input should be a valid string"),
    "half a character": ('{"prompt": "\\ud800"}', "surrogate"),
    "half a name": ('{"prompt": "x", "model": "\\ud800"}', "surrogate"),
    "nan": ('{"prompt": "x", "temperature": NaN}', "temperature"),
    "temperature": ('{"prompt": "x", "temperature": -1}', "temperature"),
    "top_p": ('{"prompt": "x", "top_p": 0}', "top_p"),
    "penalty": ('{"prompt": "x", "repetition_penalty": 1e-300}', "repetition_penalty"),
    "less than no tokens": ('{"prompt": "x", "max_tokens": -2}', "max_tokens"),
    "frequency": ('{"prompt": "x", "frequency_penalty": 3}', "frequency_penalty"),
    "bias": ('{"prompt": "x", "logit_bias": {"5": 101}}', "logit_bias"),
    "bias of a word": ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias"),
    "bias of half a character": ('{"prompt": "x", "logit_bias": {"\\ud800": 1}}', "logit_bias"),
    "bias of an unknown token": ('{"prompt": "x", "logit_bias": {"1024": 1}}', "no such token"),
    "many biases": (json.dumps({"prompt": "x", "logit_bias": dict.fromkeys(range(2000), 1)}), "at most 1024"),
    "messages": ('{"prompt": "x", "messages": []}', "messages is not supported"),
    "grammar": ('{"prompt": "x", "grammar": "root ::= x"}', "grammar is not supported"),
    "what nobody knows": ('{"prompt": "x", "n_keep\\ud800": 0}', "n_keep\\ud800 is not supported"),
    "copies": ('{"prompt": "x", "n": 1000}', "n: "),
    "long stop": (
        '{"prompt": "x", "stop": ["a", "' + "x" * 300 + '"]}',
        "stop.1: String should have at most 256",
    ),
    "many stops": (json.dumps({"prompt": "x", "stop": ["x"] * 17}), "stop: List should have at most 16"),
    "limits that differ": ('{"prompt": "x", "max_tokens": 9, "n_predict": 4}', "max_tokens is given twice"),
    "options of no stream": ('{"prompt": "x", "stream_options": {}}', "stream_options is of a stream"),
    "unknown option": (
        '{"prompt": "x", "stream": true, "stream_options": {"a": 1}}',
        "stream_options.a: Extra",
    ),
    "tools": ('{"prompt": "x", "tools": [{}]}', "tools is not supported"),
}


def longest_wait(client: httpx.Client, until: Future[httpx.Response]) -> float:
    """Ask for the server's health until a reply has come; return how long that took at most, in seconds."""
    longest = 0.0
    while not until.done():
        start = time.monotonic()
        assert client.get("/health").status_code == 200
        longest = max(longest, time.monotonic() - start)
    return longest


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
        [
            [],
            [{}],
            [{"role": "user", "content": "x", "tool_calls": [{}]}],
            [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}],
            "hello",
        ],
        ids=str,
    )
    def test_bad_messages(self, client: httpx.Client, messages: object) -> None:
        reply = client.post("/v1/chat/completions", json={"messages": messages})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "messages"

    def test_which_part_of_a_message_is_bad(self, client: httpx.Client) -> None:
        parts = [{"type": "text", "text": "x"}, {"type": "image_url", "text": "x"}]
        messages = [{"role": "user", "content": parts}]
        reply = client.post("/v1/chat/completions", json={"messages": messages})
        assert "messages.0.content.1.type: String" in reply.json()["error"]["message"]

    def test_top_logprobs_alone(self, client: httpx.Client) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}
        reply = client.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["message"]) == (
            400,
            "top_logprobs needs logprobs: true",
        )

    def test_a_template_that_fails(self, demo: Path) -> None:
        """The client is told: who sent what the template does not expect can mend it, retries cannot."""

        def change(tokenizer: Tokenizer) -> None:
            tokenizer.chat_template = "{{ messages[0].content + suffix }}"

        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        with client_of(demo, change) as client:
            post(client, "chat/completions", **body, chat_template_kwargs={"suffix": "!"})
            body["chat_template_kwargs"] = {"suffix": 3}
            reply = client.post("/v1/chat/completions", json=body)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
            assert "can only concatenate str" in reply.json()["error"]["message"]

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
            assert "Content-Type: application/json" in reply.json()["error"]["message"]
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
            body = {**HEAVY, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                refused = client.post("/v1/completions", json={"prompt": PROMPT, "n": 2})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            wait_until(lambda: is_idle(client))
            assert text_of(client, max_tokens=2)

    def test_more_texts_than_can_ever_wait(self, demo: Path) -> None:
        """They are refused before anything is made of them, and meanwhile others are served."""
        with client_of(demo, sequences=1, queue=3) as client, ThreadPoolExecutor(1) as pool:
            assert len(post(client, prompt=[[5], [6]], n=2, max_tokens=1)["choices"]) == 4
            assert client.post("/v1/completions", json={"prompt": [[5]] * 5}).status_code == 400
            many = pool.submit(client.post, "/v1/completions", json={"prompt": [[5]] * 20_000, "n": 16})
            longest = longest_wait(client, many)
            assert many.result().status_code == 400
            assert "too many texts" in many.result().json()["error"]["message"]
            assert longest < 1

    @pytest.mark.parametrize(
        "body", [{"prompt": [{}] * 200_000}, {"messages": [1] * 200_000}], ids=["prompt", "messages"]
    )
    def test_many_faults_are_not_listed(self, client: httpx.Client, body: Json) -> None:
        path = "completions" if "prompt" in body else "chat/completions"
        with ThreadPoolExecutor(1) as pool:
            many = pool.submit(client.post, f"/v1/{path}", json=body)
            longest = longest_wait(client, many)
            assert many.result().status_code == 400
            assert longest < 1

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
            health = client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "failed")
            wait_until(lambda: is_idle(client))

    def test_tokens_that_only_the_tokenizer_knows(self, demo: Path) -> None:
        """They are refused at once: in a pass they would fail the texts of others."""

        def add(tokenizer: Tokenizer) -> None:
            tokenizer._model.add_tokens(["<new>"])

        with client_of(demo, add) as client:
            for path, body in (
                ("completions", {"prompt": "a <new>"}),
                ("chat/completions", {"messages": [{"role": "user", "content": "<new>"}]}),
            ):
                reply = client.post(f"/v1/{path}", json=body)
                assert reply.status_code == 400
                assert "no such token" in reply.json()["error"]["message"]

    def test_a_bug_is_told_as_json(self, demo: Path) -> None:
        def break_it(tokenizer: Tokenizer) -> None:
            def encode(text: str, add_special: bool = True) -> list[int]:
                raise ZeroDivisionError

            tokenizer.encode = encode  # type: ignore[method-assign]

        with client_of(demo, break_it) as client:
            reply = client.post("/v1/completions", json={"prompt": PROMPT})
            assert (reply.status_code, reply.json()["error"]["message"]) == (500, "internal error")
            assert client.get("/health").status_code == 200

    @pytest.mark.parametrize(
        "options", [{"port": -1}, {"sequences": 0}, {"api_key": ""}, {"queue": -1}], ids=str
    )
    def test_bad_options(self, options: Json) -> None:
        with pytest.raises(UsageError):
            ServeOptions(**options)
