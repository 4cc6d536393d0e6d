"""One text being generated: what is asked for, what has come of it, and the events that tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import IrqError
from irq_runtime.sampling import SamplingParams, likeliest, sample
from irq_runtime.text_stream import TextStream
from irq_runtime.tokenizer import Tokenizer

__all__ = ["Delta", "Done", "Event", "Generation", "Job", "TokenLogprobs"]


@dataclass(frozen=True)
class Generation:
    """What is asked for.

    Attributes:
        prompt: At least one token.
        params: How tokens are chosen.
        stop: Strings that end the text.
        logprobs: How many of the likeliest tokens to report at each position; None: report nothing.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """A token and its natural-log probability before sampling parameters; likewise the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """Text that is now certain, and the token behind it if log probabilities are asked for."""

    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Done:
    """The end: always the last event.

    Attributes:
        reason: ``stop``, ``length``, ``cancelled`` or ``error``.
        tokens: Generated, without a stop token.
        cached: Tokens of the prompt that had been read for an earlier request.
        error: What went wrong, or None.
    """

    reason: str
    tokens: int
    cached: int = 0
    error: IrqError | None = None


Event = Delta | Done


class Job:
    """A generation on its way through the scheduler.

    Attributes:
        unread: Tokens the model has not read yet.
        cached: Of the prompt, tokens that needed no reading.
        cancelled: Nobody wants the rest; set from any thread.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, emit: Callable[[Event], None]) -> None:
        self.unread = list(generation.prompt)
        self.cached = 0
        self.cancelled = False
        self._generation = generation
        self._emit = emit
        self._rng = np.random.Generator(np.random.PCG64(generation.params.seed))
        self._seen = list(generation.prompt)
        self._text = TextStream(tokenizer, generation.prompt, generation.stop)
        self._tokens = 0

    def advance(self, logits: NDArray[np.float32]) -> str | None:
        """Choose the token after ``unread``; return why the text ends, or None if it goes on.

        Args:
            logits: ``(vocab_size,)``.

        Raises:
            MalformedFile: The logits are not numbers.
        """
        params, prompt = self._generation.params, self._generation.prompt
        if params.max_tokens == 0:
            return self._finish("length")
        token = sample(logits, params, self._rng, self._seen, len(prompt))
        if token in params.stop_tokens:
            return self._finish("stop")
        self._tokens += 1
        self._seen.append(token)
        self.unread = [token]
        wanted = self._generation.logprobs
        logprobs = None if wanted is None else _logprobs(logits, token, wanted)
        text = self._text.push(token)
        if text or logprobs is not None:
            self._emit(Delta(text, logprobs))
        if self._text.stopped or self._tokens == params.max_tokens:
            return self._finish("length")
        return None

    def end(self, reason: str, error: IrqError | None = None) -> None:
        """Emit the end."""
        self._emit(Done(reason, self._tokens, self.cached, error))

    def _finish(self, reason: str) -> str:
        """Emit the text held back; return the reason, which is ``stop`` if there is a stop string in it."""
        rest = self._text.finish()
        if rest:
            self._emit(Delta(rest))
        return "stop" if self._text.stopped else reason


def _logprobs(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    top = tuple((int(index), _written(scores[index])) for index in likeliest(scores, count))
    return TokenLogprobs(token, _written(scores[token]), top)


def _written(logprob: np.float64) -> float:
    """Return a number that JSON can hold: OpenAI writes -9999 for what cannot happen."""
    return max(float(logprob), -9999.0)
