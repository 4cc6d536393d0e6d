"""One text being generated: what is asked for, what has come of it, and the events that tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import IrqError
from irq_runtime.sampling import SamplingParams, sample
from irq_runtime.serve.logprobs import LogprobWriter, TokenLogprobs
from irq_runtime.text_stream import TextStream
from irq_runtime.tokenizer import Tokenizer

__all__ = ["Delta", "Done", "Event", "Generation", "Job"]


@dataclass(frozen=True)
class Generation:
    """What is asked for.

    Attributes:
        prompt: At least one token.
        params: How tokens are chosen.
        stop: Strings that end the text.
        logprobs: How many of the likeliest tokens to report at each position; None: report nothing.
        echo: Text of the prompt, to be repeated with its log probabilities; None: leave it out.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: str | None = None


@dataclass(frozen=True)
class Delta:
    """Text that is now certain, and the tokens behind it if log probabilities are asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


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
        wants_all_logits: Those of the prompt too, so that all of it must be read.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, emit: Callable[[Event], None]) -> None:
        self.unread = list(generation.prompt)
        self.cached = 0
        self.cancelled = False
        self.wants_all_logits = generation.echo is not None and generation.logprobs is not None
        self._generation = generation
        self._emit = emit
        self._rng = np.random.Generator(np.random.PCG64(generation.params.seed))
        self._seen = list(generation.prompt)
        self._text = TextStream(tokenizer, generation.prompt, generation.stop)
        self._tokens = 0
        self._sent = 0  # characters
        self._entries: list[TokenLogprobs] = []  # of tokens whose text may yet be cut off
        self._writer: LogprobWriter | None = None
        if generation.logprobs is not None:
            before = generation.prompt if generation.echo is None else ()
            self._writer = LogprobWriter(tokenizer, before, generation.logprobs)

    def begin(self, cached: int) -> None:
        """Take a seat where so many tokens of the prompt have been read; repeat the prompt if asked to."""
        self.cached = cached
        if self._generation.echo is not None:
            first = self._written([self._generation.prompt[0]], [None])
            self._tell(self._generation.echo, first)
        del self.unread[:cached]

    def read(self, count: int, logits: NDArray[np.float32]) -> None:
        """Take note that the model has read the next tokens of the prompt, but not the last.

        Args:
            count: How many.
            logits: After each, ``(count, vocab_size)``, if ``wants_all_logits``.

        Raises:
            MalformedFile: The logits are not numbers.
        """
        if self.wants_all_logits:
            self._tell("", self._written(self.unread[1 : count + 1], logits))
        del self.unread[:count]

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
        logprobs = self._written([token], [logits])
        if token in params.stop_tokens:
            # who scores a text counts on one token more, and leaves it out
            return self._finish("stop", logprobs if self.wants_all_logits else ())
        self._tokens += 1
        self._seen.append(token)
        self.unread = [token]
        self._tell(self._text.push(token), logprobs)
        if self._text.stopped or self._tokens == params.max_tokens:
            return self._finish("length")
        return None

    def end(self, reason: str, error: IrqError | None = None) -> None:
        """Emit the end."""
        self._emit(Done(reason, self._tokens, self.cached, error))

    def _written(
        self, tokens: Sequence[int], logits: Iterable[NDArray[np.float32] | None]
    ) -> tuple[TokenLogprobs, ...]:
        writer = self._writer
        if writer is None:
            return ()
        return tuple(writer.write(token, row) for token, row in zip(tokens, logits, strict=True))

    def _tell(self, text: str, logprobs: Sequence[TokenLogprobs]) -> None:
        """Emit text, and what is known of the tokens that begin in it."""
        self._sent += len(text)
        self._entries += logprobs
        count = sum(entry.offset < self._sent for entry in self._entries)  # offsets do not fall
        if text or count:
            self._emit(Delta(text, tuple(self._entries[:count])))
            del self._entries[:count]

    def _finish(self, reason: str, logprobs: Sequence[TokenLogprobs] = ()) -> str:
        """Emit the text held back; return the reason, which is ``stop`` if there is a stop string in it."""
        self._tell(self._text.finish(), logprobs)
        if self._text.stopped:
            return "stop"
        if self._entries:  # of tokens without a text
            self._emit(Delta("", tuple(self._entries)))
        return reason
