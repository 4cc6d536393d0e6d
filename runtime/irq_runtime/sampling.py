"""Choosing the next token, and the loop around it.

The order of operations is that of transformers and vLLM: bias, repetition penalty, frequency and presence
penalties, temperature, top-k, top-p, min-p, then one uniform number of a seeded PCG64 looked up in the
cumulative distribution. Temperature 0 takes the most likely token, of equal ones the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile, UsageError

__all__ = ["SamplingParams", "StepModel", "checked", "generate", "likeliest", "probabilities", "sample"]

FloatArray = NDArray[np.floating]

#: How many tokens top-p sorts at first: most distributions reach it with fewer.
_FEW = 1024

#: Prompt tokens read at a time, so that Ctrl-C acts soon: the native engine's own batch, which keeps bits.
_PIECE = 256


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
        frequency_penalty: Taken from a logit each time that its token has been generated (OpenAI's; 0: off).
        presence_penalty: Taken once from the logit of a token that has been generated (OpenAI's; 0: off).
        logit_bias: Tokens, and what is added to their logits: 100 forces a token, -100 bans it.
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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
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
            ("frequency_penalty", "-100 to 100", -100 <= self.frequency_penalty <= 100),
            ("presence_penalty", "-100 to 100", -100 <= self.presence_penalty <= 100),
            ("logit_bias", "-100 to 100", all(i >= 0 and -100 <= bias <= 100 for i, bias in self.logit_bias)),
            ("seed", "0 or more", self.seed >= 0),
        ):
            if not good:
                raise UsageError("out of range", where=name, expected=allowed, got=getattr(self, name))


class StepModel(Protocol):
    """What :func:`generate` needs of a model."""

    def next_logits(self, tokens: Sequence[int]) -> FloatArray:
        """Append tokens and return the logits after the last one, ``(vocab_size,)``."""


def probabilities(
    logits: FloatArray, params: SamplingParams, seen: Sequence[int] = (), prompt_tokens: int = 0
) -> NDArray[np.float64]:
    """Return the distribution that is sampled, float64 ``(vocab_size,)``.

    Args:
        logits: ``(vocab_size,)``.
        params: How; a temperature of 0 gives all weight to one token.
        seen: Tokens of the context, for the penalties.
        prompt_tokens: How many of them nobody generated: only the repetition penalty counts those.

    Raises:
        MalformedFile: The logits hold NaN or infinity, or are all minus infinity: a broken model.
    """
    scores = _scores(logits, params, seen, prompt_tokens)
    full = np.zeros(scores.size)
    if params.temperature == 0:
        full[int(scores.argmax())] = 1
        return full
    ids = likeliest(scores, params.top_k) if params.top_k else np.arange(scores.size)
    with np.errstate(over="ignore"):  # -inf at temperatures near 0
        p = np.exp((scores[ids] - scores.max()) / params.temperature)
    p /= p.sum()
    if params.top_p < 1:
        nucleus = _nucleus(scores[ids], p, params.top_p)
        ids, p = ids[nucleus], p[nucleus]
    p[p < params.min_p * p.max()] = 0
    full[ids] = p / p.sum()
    return full


def likeliest(scores: FloatArray, count: int) -> NDArray[np.intp]:
    """Return the indices of the ``count`` largest scores (fewer if there are fewer), largest first.

    Of equal ones the lower index comes first. Only those found are sorted: a vocabulary of 49,152 costs
    0.3 ms instead of 5.
    """
    if count >= scores.size:
        return np.argsort(-scores, kind="stable")
    if count == 0:
        return np.empty(0, np.intp)
    least = np.partition(scores, scores.size - count)[scores.size - count]
    ids = np.flatnonzero(scores >= least)
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def checked(logits: FloatArray) -> NDArray[np.float64]:
    """Return logits in float64.

    Raises:
        MalformedFile: As :func:`probabilities`.
    """
    scores = logits.astype(np.float64)
    if not np.isfinite(scores.max()):  # NaN is the maximum wherever it is
        raise MalformedFile(
            "the model's logits are not numbers",
            got=float(scores.max()),
            hint="With half_cache, try without: keys and values beyond 65504 do not fit in fp16",
        )
    return scores


def _scores(
    logits: FloatArray, params: SamplingParams, seen: Sequence[int], prompt_tokens: int
) -> NDArray[np.float64]:
    """Return finite logits (or -inf) after bias and penalties."""
    scores = checked(logits)
    for token, bias in params.logit_bias:
        scores[token] += bias
    penalty = params.repetition_penalty
    if penalty != 1 and len(seen):
        ids = np.unique(np.asarray(seen))
        with np.errstate(over="ignore"):
            penalised = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)
        limit = np.finfo(np.float64).max
        scores[ids] = penalised.clip(-limit, limit)
    if (params.frequency_penalty or params.presence_penalty) and len(seen) > prompt_tokens:
        ids, counts = np.unique(np.asarray(seen[prompt_tokens:]), return_counts=True)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return scores


def _nucleus(scores: NDArray[np.float64], p: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Return the fewest indices whose probabilities reach ``top_p``, likely first."""
    count = _FEW
    while True:
        best = likeliest(scores, count)
        reached = np.cumsum(p[best])
        if reached[-1] >= top_p or count >= p.size:
            return best[: int(np.searchsorted(reached, top_p)) + 1]
        count *= 16


def sample(
    logits: FloatArray,
    params: SamplingParams,
    rng: np.random.Generator,
    seen: Sequence[int] = (),
    prompt_tokens: int = 0,
) -> int:
    """Choose a token: the first whose cumulative probability, by id, exceeds one uniform number.

    Args:
        logits: ``(vocab_size,)``.
        params: How.
        rng: Source of the number; not used at temperature 0.
        seen: Tokens of the context, for the penalties.
        prompt_tokens: How many of them nobody generated: only the repetition penalty counts those.

    Raises:
        MalformedFile: As :func:`probabilities`.
    """
    if params.temperature == 0:
        return int(_scores(logits, params, seen, prompt_tokens).argmax())
    p = probabilities(logits, params, seen, prompt_tokens)
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
    while params.max_tokens and len(new) > _PIECE:
        model.next_logits(new[:_PIECE])
        new = new[_PIECE:]
    for _ in range(params.max_tokens):
        token = sample(model.next_logits(new), params, rng, seen, len(prompt))
        if token in params.stop_tokens:
            return
        yield token
        seen.append(token)
        new = (token,)
