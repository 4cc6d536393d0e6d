"""Log-likelihoods of continuations, whatever runs the model.

``TorchScorer`` batches sequences of similar length and computes equal ones once (the four letters of a
multiple-choice question follow one context). ``CachedScorer`` drives a runtime with a cache that can be
cut back: what a request shares with the one before it is not read again, be it a context or the five
examples of a subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from irq_export.evaluate.questions import Request
from irq_export.parity.metrics import log_softmax
from irq_runtime.engine import Engine
from irq_runtime.reference import ReferenceModel

if TYPE_CHECKING:
    from irq_export.parity.llamacpp import LlamaCpp
    from irq_export.parity.onnx_runtimes import OnnxRuntime

__all__ = [
    "CachedScorer",
    "LlamaCppScorer",
    "Score",
    "Scorer",
    "engine_scorer",
    "onnx_scorer",
    "reference_scorer",
]

Floats = NDArray[np.floating]
#: Called with the number of requests done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """The answer to a request.

    Attributes:
        logprob: Natural logarithm of the continuation's probability.
        greedy: Whether every token of it is the most likely one; None if the runtime does not tell.
    """

    logprob: float
    greedy: bool | None


class Scorer(Protocol):
    """A model that can be asked for log-likelihoods.

    Attributes:
        name: Of the runtime, for reports.
        max_length: Tokens a sequence may hold.
    """

    name: str
    max_length: int

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Return one score a request, in their order."""
        ...


class CachedScorer:
    """A runtime that appends tokens to a cache.

    Args:
        name: Of the runtime.
        max_length: Tokens a sequence may hold.
        last: Appends tokens and returns the logits after the last one, ``(vocab,)``.
        each: Appends tokens and returns the logits after each, ``(n, vocab)``.
        truncate: Forgets all positions from the given one on.
    """

    def __init__(
        self,
        name: str,
        max_length: int,
        *,
        last: Callable[[Sequence[int]], Floats],
        each: Callable[[Sequence[int]], Floats],
        truncate: Callable[[int], None],
    ) -> None:
        self.name = name
        self.max_length = max_length
        self._last, self._each, self._truncate = last, each, truncate
        self._cached: tuple[int, ...] = ()
        self._context: tuple[int, ...] = ()
        self._row: Floats = np.empty(0)  # logits after the context, (vocab,)

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Return one score a request; neighbours that share a beginning are cheap."""
        scores = []
        for done, request in enumerate(requests):
            scores.append(self._score(request.fitted(self.max_length)))
            if progress is not None:
                progress(done + 1)
        return scores

    def _score(self, request: Request) -> Score:
        self._read(request.context)
        rows = self._row[None]
        if len(request.continuation) > 1:
            rows = np.concatenate([rows, self._each(request.continuation[:-1])])
        self._cached = request.context + request.continuation[:-1]
        return _score_rows(rows, request.continuation)

    def _read(self, context: tuple[int, ...]) -> None:
        """Bring the cache to exactly this context, and ``_row`` to the logits after it."""
        if context == self._context:
            self._truncate(len(context))
            return
        keep = _common(self._cached, context[:-1])  # the last one is read again: its logits are needed
        self._context, self._cached = (), context[:keep]
        self._truncate(keep)
        self._row = self._last(context[keep:])
        self._context = context


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _score_rows(logits: Floats, continuation: Sequence[int]) -> Score:
    """Score a continuation ``(n,)`` from the logits ``(n, vocab)`` that predict it."""
    logprobs = log_softmax(logits)
    total = float(logprobs[np.arange(len(continuation)), list(continuation)].sum())
    return Score(total, bool((logits.argmax(axis=1) == np.array(continuation)).all()))


def engine_scorer(engine: Engine) -> CachedScorer:
    """Return a scorer over the native engine."""
    session = engine.session()
    return CachedScorer(
        f"native {engine.mode}",
        engine.info.context,
        last=session.next_logits,
        each=lambda tokens: engine.step(tokens, session.cache),
        truncate=session.cache.truncate,
    )


def reference_scorer(model: ReferenceModel, dtype: DTypeLike = np.float32) -> CachedScorer:
    """Return a scorer over the numpy runtime."""
    cache = model.new_cache(dtype)
    return CachedScorer(
        f"reference {np.dtype(dtype)}",
        model.config.max_position_embeddings,
        last=lambda tokens: model.head(model.hidden(tokens, cache)[-1:])[0],
        each=lambda tokens: model.step(tokens, cache),
        truncate=cache.truncate,
    )


def onnx_scorer(runtime: OnnxRuntime, max_length: int) -> CachedScorer:
    """Return a scorer over a session of onnxruntime, for sequences of at most ``max_length`` tokens."""
    cache = runtime.empty_cache()  # of every layer keys and values (1, kv heads, positions, head_dim)

    def each(tokens: Sequence[int]) -> Floats:
        logits, cache[:] = runtime.step(tokens, cache)
        return logits.astype(np.float32, copy=False)

    def truncate(length: int) -> None:
        cache[:] = [array[:, :, :length] for array in cache]

    return CachedScorer(
        runtime.name, max_length, last=lambda tokens: each(tokens)[-1], each=each, truncate=truncate
    )


class LlamaCppScorer:
    """Stock llama.cpp, one decode step a scored token; its server keeps the common beginning of prompts."""

    def __init__(self, server: LlamaCpp) -> None:
        self.name = "llama.cpp"
        self.max_length = server.ctx - 1  # the server reads the last token too
        self._server = server

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """Return one score a request; whether it is greedy is not known."""
        scores = []
        for done, request in enumerate(requests):
            fitted = request.fitted(self.max_length)
            tokens: Any = fitted.context + fitted.continuation
            values = self._server.next_token_logprobs(tokens, first=len(fitted.context))
            scores.append(Score(float(values.sum()), None))
            if progress is not None:
                progress(done + 1)
        return scores
