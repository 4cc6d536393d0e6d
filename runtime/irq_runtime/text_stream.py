"""Tokens to text as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from irq_runtime.tokenizer import Tokenizer

__all__ = ["TextStream"]

_REPLACEMENT = "\ufffd"  # what a decoder gives for an unfinished UTF-8 sequence


class TextStream:
    """Incremental decoder.

    Attributes:
        stopped: A stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """Start after a prompt.

        Args:
            tokenizer: Decodes.
            prompt: Tokens before the first one pushed; they decide about a leading space.
            stop: Strings that end the text; empty ones are ignored.
        """
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        # Tokens since the last but one point where the text ended in a whole character: a decoder
        # needs those before a token to know whether a space belongs in front of it.
        self._ids = list(prompt)
        self._taken = len(self._ids)  # how many of them are in the text already
        self._held = ""  # taken, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._taken :]
        self._taken = len(self._ids)
        return self._release(fresh, final=False)

    def finish(self) -> str:
        """Return what was held back; an unfinished character comes out as U+FFFD."""
        if self.stopped:
            return ""
        fresh = self._fresh()
        self._taken = len(self._ids)
        whole = fresh.rstrip(_REPLACEMENT)  # byte tokens may give one each, whole characters of theirs too
        return self._release(whole + fresh[len(whole) :][:1], final=True)

    def _fresh(self) -> str:
        """Return the text that the tokens after the taken ones add.

        Where those end within a character, which only a prompt of tokens can, it is the whole character.
        """
        before = self._tokenizer.decode(self._ids[: self._taken])
        text = self._tokenizer.decode(self._ids)
        while before.endswith(_REPLACEMENT) and not text.startswith(before):
            before = before[:-1]
        return text[len(before) :]

    def _release(self, fresh: str, *, final: bool) -> str:
        text = self._held + fresh
        begins = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if begins:
            self.stopped, self._held = True, ""
            return text[: min(begins)]
        keep = 0 if final else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
