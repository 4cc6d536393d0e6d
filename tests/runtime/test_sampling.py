"""Sampling: each filter against its definition, and the sampler against its distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from irq_formats.errors import UsageError
from irq_runtime.sampling import SamplingParams, generate, probabilities, sample
from tests.tolerance import SAMPLING_SIGMAS

LOGITS = np.random.default_rng(0).standard_normal(100) * 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=0.8, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(params: SamplingParams) -> None:
    seen = [3, 3, int(LOGITS.argmax())]
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
            TemperatureLogitsWarper(params.temperature),
        ]
    )
    processors += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    processors += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    processors += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    scores = processors(torch.tensor([seen]), torch.from_numpy(LOGITS)[None].clone())
    expected = torch.softmax(scores[0], dim=-1).numpy()
    np.testing.assert_allclose(probabilities(LOGITS, params, seen), expected, rtol=1e-12, atol=0)


def test_greedy_takes_the_first_of_equals() -> None:
    rng = np.random.default_rng(0)
    assert sample(np.array([0.0, 2.0, 2.0], np.float32), SamplingParams(), rng) == 1


def test_repetition_penalty_moves_greedy() -> None:
    logits = np.array([1.0, 2.0, -1.0])
    rng = np.random.default_rng(0)
    assert sample(logits, SamplingParams(repetition_penalty=3.0), rng, seen=[1]) == 0


def test_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.0, top_k=10)
    p = probabilities(LOGITS, params)
    rng = np.random.default_rng(7)
    n = 4000
    counts = np.bincount([sample(LOGITS, params, rng) for _ in range(n)], minlength=p.size)
    assert (counts[p == 0] == 0).all()
    sigma = np.sqrt(n * p * (1 - p))
    assert (np.abs(counts - n * p) <= SAMPLING_SIGMAS * sigma).all()


class Counter:
    """A model of ten tokens that says i + 1 after i."""

    def next_logits(self, tokens: Sequence[int]) -> np.ndarray:
        logits = np.zeros(10)
        logits[(tokens[-1] + 1) % 10] = 4.0
        return logits


def test_generate_stops() -> None:
    assert list(generate(Counter(), [1, 2], SamplingParams(max_tokens=4))) == [3, 4, 5, 6]
    params = SamplingParams(max_tokens=4, stop_tokens=(5,))
    assert list(generate(Counter(), [2], params)) == [3, 4]
    assert list(generate(Counter(), [2], SamplingParams(max_tokens=0))) == []
    with pytest.raises(UsageError):
        list(generate(Counter(), [], SamplingParams()))


def test_seeds() -> None:
    def run(seed: int) -> list[int]:
        return list(generate(Counter(), [0], SamplingParams(max_tokens=30, temperature=3, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_tokens": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**wrong)  # type: ignore[arg-type]
