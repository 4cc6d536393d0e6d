"""Tokens of a text with their probabilities, as replies show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_runtime.sampling import checked, likeliest
from irq_runtime.text_stream import TextStream
from irq_runtime.tokenizer import Tokenizer

__all__ = ["LogprobWriter", "TokenLogprobs"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token and its natural-log probability before sampling parameters; likewise the likeliest ones.

    Attributes:
        text: Of the token, special ones too.
        logprob: None for the first token of a text.
        top: The likeliest tokens at its place, likeliest first; None as above.
        offset: Characters of the text before it.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] | None
    offset: int


class LogprobWriter:
    """Follows a text token by token.

    Args:
        tokenizer: Shows tokens.
        before: Tokens before the text.
        count: How many of the likeliest tokens to show.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], count: int) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._stream = TextStream(tokenizer, before)
        self._offset = 0
        # A decoder drops the space of a first token: each is decoded after this one.
        self._anchor = tokenizer.encode("a", add_special=False)[-1:]
        self._anchor_length = len(tokenizer.decode(self._anchor))

    def write(self, token: int, logits: NDArray[np.float32] | None) -> TokenLogprobs:
        """Return what to show of the next token.

        Args:
            token: The token.
            logits: Of all tokens at its place, ``(vocab_size,)``; None if the model said nothing there.

        Raises:
            MalformedFile: The logits are not numbers.
        """
        offset = self._offset
        self._offset += len(self._stream.push(token))
        if logits is None:
            return TokenLogprobs(self._shown(token), None, None, offset)
        scores = checked(logits)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        top = tuple((self._shown(int(i)), _written(scores[i])) for i in likeliest(scores, self._count))
        return TokenLogprobs(self._shown(token), _written(scores[token]), top, offset)

    def _shown(self, token: int) -> str:
        return self._tokenizer.decode([*self._anchor, token], skip_special=False)[self._anchor_length :]


def _written(logprob: np.float64) -> float:
    """Return a number that JSON can hold: OpenAI writes -9999 for what cannot happen."""
    return max(float(logprob), -9999.0)
