"""The JSON of replies: one format for each endpoint, whole and as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from irq_runtime.serve.generation import TokenLogprobs
from irq_runtime.tokenizer import Tokenizer

__all__ = ["ChatFormat", "CompletionFormat", "Format", "Json"]

Json = dict[str, Any]
Logprobs = Sequence[TokenLogprobs] | None


class Format:
    """Writes one reply; subclasses know an endpoint's names.

    Args:
        model: Name of the model.
        tokenizer: Shows the tokens of log probabilities.
    """

    prefix: str
    whole_kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._header = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def choice(self, index: int, text: str, logprobs: Logprobs, reason: str) -> Json:
        """Return one choice of a whole reply."""
        raise NotImplementedError

    def delta(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> Json:
        """Return one choice of a chunk: more text, or with ``reason`` the end."""
        raise NotImplementedError

    def opening(self, index: int) -> Json | None:
        """Return the choice of the chunk before the first text, if there is such a chunk."""
        return None

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        """Return a whole reply."""
        return {"object": self.whole_kind, **self._header, "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        """Return a chunk of a stream."""
        chunk = {"object": self.chunk_kind, **self._header, "choices": list(choices)}
        return chunk if usage is None else {**chunk, "usage": usage}

    def _shown(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


class CompletionFormat(Format):
    """``/v1/completions``."""

    prefix = "cmpl"
    whole_kind = chunk_kind = "text_completion"

    def choice(self, index: int, text: str, logprobs: Logprobs, reason: str) -> Json:
        """Return one choice of a whole reply."""
        return self.delta(index, text, logprobs, reason)

    def delta(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> Json:
        """Return one choice of a chunk."""
        return {"index": index, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": reason}

    def _logprobs(self, entries: Logprobs) -> Json | None:
        if entries is None:
            return None
        return {
            "tokens": [self._shown(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._shown(token): logprob for token, logprob in entry.top} for entry in entries
            ],
        }


class ChatFormat(Format):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int, text: str, logprobs: Logprobs, reason: str) -> Json:
        """Return one choice of a whole reply."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, **self._end(logprobs, reason)}

    def delta(self, index: int, text: str, logprobs: Logprobs, reason: str | None) -> Json:
        """Return one choice of a chunk."""
        delta = {} if reason else {"content": text}
        return {"index": index, "delta": delta, **self._end(logprobs, reason)}

    def opening(self, index: int) -> Json | None:
        """Return the choice that names the role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, **self._end(None, None)}

    def _end(self, logprobs: Logprobs, reason: str | None) -> Json:
        return {"logprobs": self._logprobs(logprobs), "finish_reason": reason}

    def _logprobs(self, entries: Logprobs) -> Json | None:
        if entries is None:
            return None
        return {
            "content": [
                {
                    **self._entry(entry.token, entry.logprob),
                    "top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top],
                }
                for entry in entries
            ]
        }

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._shown(token)
        data = None if "\ufffd" in text else list(text.encode())  # half a character: its bytes are not known
        return {"token": text, "logprob": logprob, "bytes": data}
