"""The HTTP server, one client: replies equal those of ``run``, streams equal whole replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from irq_formats.gguf import open_gguf
from irq_runtime.completion import complete
from irq_runtime.tokenizer import Tokenizer, load_tokenizer
from tests.serving import CHUNK, LONG, PROMPT, Json, client_of, events_of, post, text_of

JSON = {"content-type": "application/json"}


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
        assert len({run(seed=seed) for seed in (-3, -2, 0, 1)}) == 4
        assert run() != run()
        assert run(seed=-1) != run(seed=-1)

    def test_sampling_is_that_of_run(self, client: httpx.Client, demo: Path) -> None:
        options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1}
        expected = complete(model=demo, prompt=PROMPT, max_tokens=24, seed=3, **options)
        assert text_of(client, max_tokens=24, seed=3, **options) == expected.text

    def test_penalties_and_bias(self, client: httpx.Client, demo: Path) -> None:
        """Of generated tokens; bias names tokens by what the tokenizer calls them."""
        tokenizer = load_tokenizer(open_gguf(demo))
        plain = text_of(client, max_tokens=60, temperature=0)
        first = tokenizer.encode(PROMPT + plain)[len(tokenizer.encode(PROMPT))]

        def run(**fields: Any) -> str:
            return text_of(client, max_tokens=60, temperature=0, **fields)

        assert run(frequency_penalty=0, presence_penalty=0, logit_bias={}) == plain
        assert len({plain, run(frequency_penalty=1.5), run(presence_penalty=1.5)}) == 3
        assert run(repeat_penalty=1.3) == run(repetition_penalty=1.3) != plain
        assert run(logit_bias={str(first): -100})[:3] != plain[:3]
        assert run(logit_bias={"5": 100}) == tokenizer.decode([5] * 60)

    @pytest.mark.parametrize("limit", [{"max_tokens": -1}, {"n_predict": -1}])
    def test_the_rest_of_the_context(self, client: httpx.Client, limit: Json) -> None:
        usage = post(client, prompt=LONG, temperature=0, ignore_eos=True, **limit)["usage"]
        assert usage["total_tokens"] == 512

    def test_limits(self, client: httpx.Client) -> None:
        for names, count in (
            ({}, 16),
            ({"max_tokens": None}, 16),
            ({"max_tokens": 0}, 0),
            ({"n_predict": 3}, 3),
            ({"max_tokens": 4, "max_completion_tokens": 4}, 4),
        ):
            reply = post(client, prompt=PROMPT, ignore_eos=True, **names)
            assert reply["usage"]["completion_tokens"] == count
            assert reply["choices"][0]["finish_reason"] == "length"
        assert post(client, prompt=PROMPT, max_tokens=0)["choices"][0]["text"] == ""

    def test_ignored_end(self, client: httpx.Client, demo: Path) -> None:
        """The end is a token like others then."""
        end = load_tokenizer(open_gguf(demo)).stop_tokens[0]
        forced = {"prompt": PROMPT, "max_tokens": 5, "logit_bias": {str(end): 100}}
        assert post(client, **forced)["usage"]["completion_tokens"] == 0
        reply = post(client, **forced, ignore_eos=True)
        assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (5, "length")

    def test_fields_without_effect(self, client: httpx.Client) -> None:
        fields = {
            "user": "me",
            "best_of": 1,
            "suffix": None,
            "cache_prompt": True,
            "tools": [],
            "grammar": "",
        }
        assert text_of(client, temperature=0, **fields) == text_of(client, temperature=0)

    def test_copies_count_their_prompt_once(self, client: httpx.Client) -> None:
        reply = post(client, prompt=PROMPT, max_tokens=8, temperature=1.5, seed=0, n=3, stop=None)
        assert len({choice["text"] for choice in reply["choices"]}) == 3
        assert reply["choices"][1]["text"] == text_of(client, max_tokens=8, temperature=1.5, seed=1)
        assert reply["usage"]["prompt_tokens"] == post(client, prompt=PROMPT)["usage"]["prompt_tokens"]

    @pytest.mark.parametrize("count", [0, 1, 3, 20])
    def test_logprobs(self, client: httpx.Client, count: int) -> None:
        choice = post(client, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=count)["choices"][0]
        shown = choice["logprobs"]
        assert "".join(shown["tokens"]) == choice["text"]
        for logprob, top in zip(shown["token_logprobs"], shown["top_logprobs"], strict=True):
            assert len(top) == count
            assert logprob == max(top.values(), default=logprob) <= 0


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

    @pytest.mark.parametrize("count", [None, 0, 2])
    def test_logprobs(self, client: httpx.Client, count: int | None) -> None:
        options = {
            "messages": self.MESSAGES,
            "max_tokens": 6,
            "logprobs": True,
            "top_logprobs": count,
            "seed": 1,
        }
        choice = post(client, "chat/completions", **options)["choices"][0]
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        assert all(len(entry["top_logprobs"]) == (count or 0) for entry in entries)
        chunks = events_of(client, "chat/completions", **options)
        streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [entry for part in streamed if part for entry in part["content"]] == entries

    def test_variables_of_the_template(self, demo: Path) -> None:
        def change(tokenizer: Tokenizer) -> None:
            tokenizer.chat_template = "{{ 'Once upon a time' if enable_thinking else messages[0].content }}"

        encode = load_tokenizer(open_gguf(demo)).encode
        messages = [{"role": "user", "content": "The little dog"}]
        options = {"temperature": 0, "max_tokens": 9}
        with client_of(demo, change) as client:
            for value, text in ((True, PROMPT), (False, "The little dog")):
                variables = {"enable_thinking": value}
                body = {"messages": messages, "chat_template_kwargs": variables, **options}
                reply = post(client, "chat/completions", **body)
                expected = text_of(client, prompt=encode(text, add_special=False), **options)
                assert reply["choices"][0]["message"]["content"] == expected
            for wrong in ({"messages": []}, {"x": "\ud800"}):
                body = json.dumps({"messages": messages, "chat_template_kwargs": wrong})
                reply = client.post("/v1/chat/completions", content=body, headers=JSON)
                assert reply.status_code == 400

    def test_defaults_to_the_rest_of_the_context(self, client: httpx.Client) -> None:
        reply = post(client, "chat/completions", messages=self.MESSAGES, temperature=0)
        assert reply["usage"]["total_tokens"] == 512 or reply["choices"][0]["finish_reason"] == "stop"


class TestStreams:
    @pytest.mark.parametrize("path", ["completions", "chat/completions"])
    def test_equal_whole_replies(self, client: httpx.Client, path: str) -> None:
        prompt = {"prompt": PROMPT} if path == "completions" else {"messages": TestChat.MESSAGES}
        body = {**prompt, "max_tokens": 40, "temperature": 0.8, "seed": 5}
        whole = post(client, path, **body)
        chunks = events_of(client, path, **body, stream_options={"include_usage": True})
        *parts, usage = chunks
        assert len(parts) > 20
        assert usage["choices"] == []
        assert all(part["usage"] is None for part in parts)
        assert not any("usage" in part for part in events_of(client, path, **body))
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
