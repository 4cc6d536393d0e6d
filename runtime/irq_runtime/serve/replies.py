"""The JSON of replies: one format for each endpoint, whole and as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from irq_runtime.serve.logprobs import TokenLogprobs

__all__ = ["ChatFormat", "CompletionFormat", "Format", "Json"]

Json = dict[str, Any]
Logprobs = Sequence[TokenLogprobs] | None


class Format:
    """Writes one reply; subclasses know an endpoint's names.

    Args:
        model: Name of the model.
    """

    prefix: str
    whole_kind: str
    chunk_kind: str

    def __init__(self, model: str) -> None:
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

    def chunk(self, choices: Sequence[Json], **usage: Json | None) -> Json:
        """Return a chunk of a stream; ``usage`` is null before the last if the stream ends with it."""
        return {"object": self.chunk_kind, **self._header, "choices": list(choices), **usage}


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
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [None if entry.top is None else _by_text(entry.top) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
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
                    **_entry(entry.text, entry.logprob),
                    "top_logprobs": [_entry(text, logprob) for text, logprob in entry.top or ()],
                }
                for entry in entries
            ]
        }


def _by_text(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the likeliest of tokens that look alike: halves of characters do."""
    shown: dict[str, float] = {}
    for text, logprob in top:
        shown.setdefault(text, logprob)
    return shown


def _entry(text: str, logprob: float | None) -> Json:
    data = None if "\ufffd" in text else list(text.encode())  # half a character: its bytes are not known
    return {"token": text, "logprob": logprob, "bytes": data}
