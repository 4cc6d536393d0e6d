"""Choosing the next token, and the loop around it.

The order of operations is that of transformers: repetition penalty, temperature, top-k, top-p, min-p,
then one uniform number of a seeded PCG64 looked up in the cumulative distribution. Temperature 0 takes
the most likely token, of equal ones the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import UsageError

__all__ = ["SamplingParams", "StepModel", "generate", "probabilities", "sample"]

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        max_tokens: Tokens to generate at most.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches p (1: all).
        min_p: Drop tokens less likely than min_p times the most likely one (0: none).
        repetition_penalty: Divides positive, multiplies negative logits of tokens seen before
            (arXiv 1909.05858); 1 is off.
        seed: Seed of PCG64.
        stop_tokens: Ids that end generation and are not yielded.

    Raises:
        UsageError: A value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed, good in (
            ("max_tokens", "0 or more", self.max_tokens >= 0),
            ("temperature", "0 or more", 0 <= self.temperature < np.inf),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
            ("min_p", "0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < np.inf),
            ("seed", "0 or more", self.seed >= 0),
        ):
            if not good:
                raise UsageError("out of range", where=name, expected=allowed, got=getattr(self, name))


class StepModel(Protocol):
    """What :func:`generate` needs of a model."""

    def next_logits(self, tokens: Sequence[int]) -> FloatArray:
        """Append tokens and return the logits after the last one, ``(vocab_size,)``."""


def _penalise(logits: FloatArray, seen: Sequence[int], penalty: float) -> FloatArray:
    """Return logits with the tokens in ``seen`` made less likely, each once."""
    if penalty == 1 or not len(seen):
        return logits
    ids = np.unique(np.asarray(seen))
    scores = logits.copy()
    scores[ids] = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)
    return scores


def probabilities(
    logits: FloatArray, params: SamplingParams, seen: Sequence[int] = ()
) -> NDArray[np.float64]:
    """Return the distribution that is sampled, float64 ``(vocab_size,)``.

    Args:
        logits: ``(vocab_size,)``.
        params: How; a temperature of 0 gives all weight to one token.
        seen: Tokens of the context, for the repetition penalty.
    """
    scores = _penalise(logits.astype(np.float64), seen, params.repetition_penalty)
    if params.temperature == 0:
        one_hot = np.zeros(scores.size)
        one_hot[int(scores.argmax())] = 1
        return one_hot
    order = np.argsort(-scores, kind="stable")  # likely first; equal ones by id
    kept = scores[order] / params.temperature
    if params.top_k:
        kept = kept[: params.top_k]
    p = np.exp(kept - kept[0])
    p /= p.sum()
    if params.top_p < 1:
        p = p[: int(np.searchsorted(np.cumsum(p), params.top_p)) + 1]
    p = p[p >= params.min_p * p[0]]
    full = np.zeros(scores.size)
    full[order[: p.size]] = p / p.sum()
    return full


def sample(
    logits: FloatArray,
    params: SamplingParams,
    rng: np.random.Generator,
    seen: Sequence[int] = (),
) -> int:
    """Choose a token: the first whose cumulative probability, by id, exceeds one uniform number.

    Args:
        logits: ``(vocab_size,)``.
        params: How.
        rng: Source of the number; not used at temperature 0.
        seen: Tokens of the context, for the repetition penalty.
    """
    p = probabilities(logits, params, seen)
    if params.temperature == 0:
        return int(p.argmax())
    cumulative = np.cumsum(p)
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(p)[-1]))


def generate(model: StepModel, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Yield tokens after a prompt until a stop token or ``params.max_tokens``.

    Args:
        model: Holds the context; the prompt is appended to it.
        prompt: At least one token.
        params: How tokens are chosen.

    Raises:
        UsageError: The prompt is empty.
    """
    if not len(prompt):
        raise UsageError("the prompt is empty", hint="Give at least one token, such as BOS")
    rng = np.random.Generator(np.random.PCG64(params.seed))
    seen = list(prompt)
    new: Sequence[int] = prompt
    for _ in range(params.max_tokens):
        token = sample(model.next_logits(new), params, rng, seen)
        if token in params.stop_tokens:
            return
        yield token
        seen.append(token)
        new = (token,)
