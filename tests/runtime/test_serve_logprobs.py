"""Log probabilities in replies: their tokens' texts and places, and prompts repeated with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from irq_formats.gguf import open_gguf
from irq_runtime.engine import Engine
from irq_runtime.serve.logprobs import LogprobWriter
from irq_runtime.tokenizer import Tokenizer, load_tokenizer
from tests.serving import CHUNK, LONG, PROMPT, Json, client_of, events_of, post
from tests.tiny_tokenizers import save_tiny_tokenizer
from tests.tolerance import SERVED_LOGPROB


def choice_of(client: httpx.Client, **body: object) -> Json:
    return post(client, **{"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2, **body})[
        "choices"
    ][0]


class TestTexts:
    @pytest.mark.parametrize("kind", ["sentencepiece", "gpt-2"])
    def test_every_token_keeps_its_space_and_knows_its_place(self, tmp_path: Path, kind: str) -> None:
        tokenizer = Tokenizer(save_tiny_tokenizer(tmp_path, kind, bos=False))
        prompt, rest = tokenizer.encode("the quick"), tokenizer.encode("the quick the quick on")
        assert rest[: len(prompt)] == prompt
        writer = LogprobWriter(tokenizer, prompt, 0)
        entries = [writer.write(token, None) for token in rest[len(prompt) :]]
        text = " the quick on"
        assert "".join(entry.text for entry in entries) == text
        assert all(text[entry.offset :].startswith(entry.text) for entry in entries)

    def test_tokens_that_differ_by_a_space_are_told_apart(self, tmp_path: Path) -> None:
        model = save_tiny_tokenizer(tmp_path, "sentencepiece", bos=False)
        logits = np.zeros(model.get_vocab_size(), np.float32)
        logits[[model.token_to_id("▁the"), model.token_to_id("the")]] = 2, 1
        top = LogprobWriter(Tokenizer(model), [], 2).write(0, logits).top
        assert top is not None
        assert [text for text, _ in top] == [" the", "the"]

    def test_halves_of_a_character_stand_where_it_begins(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer(save_tiny_tokenizer(tmp_path, "gpt-2", bos=False))
        ids = tokenizer.encode("a字a")
        writer = LogprobWriter(tokenizer, [], 0)
        assert [writer.write(token, None).offset for token in ids] == [0, 1, 1, 1, 2]

    @pytest.mark.parametrize("echo", [False, True])
    def test_offsets_in_replies(self, client: httpx.Client, echo: bool) -> None:
        choice = choice_of(client, max_tokens=20, echo=echo)
        shown = choice["logprobs"]
        for token, offset in zip(shown["tokens"][1:], shown["text_offset"][1:], strict=True):
            assert choice["text"][offset:].startswith(token)
        chunks = events_of(
            client, "completions", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2, echo=echo
        )
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        for name, values in shown.items():
            assert [value for part in parts if part for value in part[name]] == values

    @pytest.mark.parametrize("echo", [False, True])
    def test_tokens_behind_a_stop_string_are_left_out(self, client: httpx.Client, echo: bool) -> None:
        """The string begins at the end of a token, and ends two tokens later."""
        whole = choice_of(client, max_tokens=20, echo=echo)
        offsets = whole["logprobs"]["text_offset"]
        stop = whole["text"][offsets[-9] - 1 : offsets[-7] + 1]
        options = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 2, "echo": echo}
        choice = choice_of(client, **options, stop=stop)
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == whole["text"][: offsets[-9] - 1]
        assert choice["logprobs"] == {name: values[:-9] for name, values in whole["logprobs"].items()}
        parts = [
            chunk["choices"][0]["logprobs"]
            for chunk in events_of(client, "completions", **options, stop=stop)
        ]
        streamed = [offset for part in parts if part for offset in part["text_offset"]]
        assert streamed == choice["logprobs"]["text_offset"]


class TestEcho:
    @pytest.mark.parametrize("prompt", [PROMPT, LONG])
    def test_the_prompt_is_scored(self, client: httpx.Client, demo: Path, prompt: str) -> None:
        """Log-softmax of the engine's logits at every position; the text is the prompt and what follows."""
        ids = load_tokenizer(open_gguf(demo)).encode(prompt)
        logits = Engine(demo, threads=1).logits(ids).astype(np.float64)
        expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        choice = choice_of(client, prompt=prompt, echo=True)
        shown = choice["logprobs"]
        assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
        got = shown["token_logprobs"][1 : len(ids)]
        np.testing.assert_allclose(
            got, expected[np.arange(len(ids) - 1), ids[1:]], rtol=0, atol=SERVED_LOGPROB
        )
        best = [max(top.values()) for top in shown["top_logprobs"][1 : len(ids)]]
        np.testing.assert_allclose(best, expected[:-1].max(axis=1), rtol=0, atol=SERVED_LOGPROB)
        assert choice["text"] == prompt + choice_of(client, prompt=prompt)["text"]
        assert len(shown["tokens"]) == len(ids) + 8

    @pytest.mark.parametrize("prompt", [[5], list(range(5, 5 + CHUNK)), list(range(5, 6 + CHUNK))], ids=len)
    def test_tokens(self, client: httpx.Client, demo: Path, prompt: list[int]) -> None:
        choice = choice_of(client, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        assert choice["text"] == load_tokenizer(open_gguf(demo)).decode(prompt)
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(prompt)

    def test_without_logprobs(self, client: httpx.Client) -> None:
        plain = [choice["text"] for choice in post(client, prompt=[PROMPT, "A cat"], n=2, seed=1)["choices"]]
        reply = post(client, prompt=[PROMPT, "A cat"], n=2, seed=1, echo=True)["choices"]
        prompts = [PROMPT, PROMPT, "A cat", "A cat"]
        assert [choice["text"] for choice in reply] == [
            prompt + text for prompt, text in zip(prompts, plain, strict=True)
        ]
        assert reply[0]["logprobs"] is None

    def test_scorers_that_leave_out_the_last_token(self, client: httpx.Client, demo: Path) -> None:
        """The end of a text counts as one: lm-eval drops the token that it asks for."""
        tokenizer = load_tokenizer(open_gguf(demo))
        ids = tokenizer.encode(PROMPT)
        bias = {str(tokenizer.stop_tokens[0]): 100}
        choice = choice_of(client, prompt=ids, max_tokens=1, echo=True, logit_bias=bias)
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == PROMPT
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1

    def test_bits_do_not_depend_on_others_or_on_what_was_read(self, demo: Path) -> None:
        with client_of(demo, sequences=3) as client:
            alone = choice_of(client, prompt=LONG, echo=True)
            assert (
                choice_of(client, prompt=LONG)["logprobs"]["token_logprobs"]
                == (alone["logprobs"]["token_logprobs"][-8:])
            )
            with ThreadPoolExecutor(5) as pool:
                several = list(pool.map(lambda _: choice_of(client, prompt=LONG, echo=True), range(5)))
            assert several == [alone] * 5

    def test_a_model_that_computes_nan(self, demo: Path) -> None:
        class Broken(Engine):
            def step(self, tokens: Sequence[int], cache: Any) -> Any:
                return super().step(tokens, cache) * np.float32("nan")

        with client_of(demo, engine=Broken) as client:
            body = {"prompt": PROMPT, "echo": True, "logprobs": 1}
            assert client.post("/v1/completions", json=body).status_code == 500
            assert events_of(client, "completions", **body)[-1]["error"]["type"] == "server_error"
            assert post(client, prompt=PROMPT)

    def test_too_many(self, client: httpx.Client) -> None:
        reply = client.post("/v1/completions", json={"prompt": PROMPT, "echo": True, "logprobs": 6})
        assert reply.status_code == 400
        assert "at most 5" in reply.json()["error"]["message"]
