"""Sampling: each filter against its definition, and the sampler against its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from irq_formats.errors import MalformedFile, UsageError
from irq_runtime.engine import Engine
from irq_runtime.sampling import SamplingParams, generate, likeliest, probabilities, sample
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


FINITE = st.floats(-1e30, 1e30) | st.sampled_from([0.0, 1.0, -1.0])  # ties are likely
EXTREME_PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 1e308) | st.sampled_from([1e-320, 5e-324, 0.7, 1.0]),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1, exclude_min=True) | st.sampled_from([5e-324, 0.5, 1.0]),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 1e308, exclude_min=True) | st.sampled_from([1e-320, 1.0, 1.3]),
    frequency_penalty=st.floats(-100, 100) | st.just(0.0),
    presence_penalty=st.floats(-100, 100) | st.just(0.0),
)


@given(
    st.lists(FINITE | st.just(-np.inf), min_size=1, max_size=40).filter(lambda x: max(x) > -np.inf),
    EXTREME_PARAMS,
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_any_parameters_give_a_distribution(
    logits: list[float], params: SamplingParams, dtype: type, seen: int
) -> None:
    """Warnings are errors here: no overflow, no NaN, and a token that is allowed."""
    values = np.array(logits, dtype)
    context = list(range(min(seen, values.size)))
    p = probabilities(values, params, context)
    assert p.shape == values.shape
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    if params.top_k:
        assert np.count_nonzero(p) <= params.top_k
    token = sample(values, params, np.random.default_rng(0), context)
    assert p[token] > 0


@given(st.integers(0, 2**32), st.integers(2, 6000), EXTREME_PARAMS)
@settings(max_examples=60, deadline=None, derandomize=True)  # a sum in another order may move the nucleus
def test_partial_sorting_is_sorting(seed: int, size: int, params: SamplingParams) -> None:
    """The distribution by the definition: everything sorted. Sizes around the first guess of top-p."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(size) * rng.choice([0.1, 3.0, 30.0]), 1)
    order = np.argsort(-logits, kind="stable")
    p = probabilities(logits, replace(params, repetition_penalty=1.0))
    if params.temperature == 0:
        order, kept = order[:1], np.ones(1)
    else:
        order = order[: params.top_k or size]
        with np.errstate(over="ignore"):
            kept = np.exp((logits[order] - logits.max()) / params.temperature)
        kept /= kept.sum()
        if params.top_p < 1:
            order = order[: int(np.searchsorted(np.cumsum(kept), params.top_p)) + 1]
        kept = kept[: order.size]
        order = order[kept >= params.min_p * kept[0]]
    expected = np.zeros(size)
    expected[order] = kept[: order.size] / kept[: order.size].sum()
    np.testing.assert_allclose(p, expected, rtol=1e-9, atol=0)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -np.inf]), min_size=1, max_size=30), st.integers(0, 40))
def test_likeliest_is_a_stable_sort_cut_short(values: list[float], count: int) -> None:
    scores = np.array(values)
    assert likeliest(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


@pytest.mark.parametrize("broken", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_a_broken_model(broken: list[float], temperature: float) -> None:
    params, rng = SamplingParams(temperature=temperature), np.random.default_rng(0)
    with pytest.raises(MalformedFile, match="not numbers"):
        sample(np.array(broken, np.float32), params, rng)


def test_greedy_takes_the_first_of_equals() -> None:
    rng = np.random.default_rng(0)
    assert sample(np.array([0.0, 2.0, 2.0], np.float32), SamplingParams(), rng) == 1


def test_repetition_penalty_moves_greedy() -> None:
    logits = np.array([1.0, 2.0, -1.0])
    rng = np.random.default_rng(0)
    assert sample(logits, SamplingParams(repetition_penalty=3.0), rng, seen=[1]) == 0


def test_openai_penalties_count_what_was_generated() -> None:
    """logit[j] - count[j] * frequency - (count[j] > 0) * presence, with counts of generated tokens only."""
    params = SamplingParams(temperature=0.8, frequency_penalty=0.7, presence_penalty=-0.3)
    expected = LOGITS.copy()
    expected[4] -= 3 * 0.7 - 0.3
    expected[9] -= 0.7 - 0.3
    seen = [2, 2, 4, 4, 9, 4, 4]
    unchanged = SamplingParams(temperature=0.8)
    np.testing.assert_allclose(
        probabilities(LOGITS, params, seen, prompt_tokens=3), probabilities(expected, unchanged), rtol=1e-12
    )
    assert (probabilities(LOGITS, params, seen, prompt_tokens=7) == probabilities(LOGITS, unchanged)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_forces_and_bans(temperature: float) -> None:
    best = int(LOGITS.argmax())
    params = SamplingParams(temperature=temperature, logit_bias=((best, -100.0), (17, 100.0)))
    p = probabilities(LOGITS, params)
    assert p[17] == pytest.approx(1)
    assert p[best] < 1e-30
    assert sample(LOGITS, params, np.random.default_rng(0)) == 17


def test_bias_comes_before_penalties() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=2.0, logit_bias=((0, 3.0),))
    p = probabilities(np.array([1.0, 0.0]), params, seen=[0])
    assert p[0] / p[1] == pytest.approx(np.exp((1 + 3) / 2))


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


def test_generate_counts_its_own_tokens() -> None:
    def run(**penalty: float) -> list[int]:
        return list(generate(Stubborn(), [5, 5, 5], SamplingParams(max_tokens=4, **penalty)))

    assert run() == [5, 5, 5, 5]
    assert run(presence_penalty=1.0) == [5, 3, 5, 5]
    assert run(frequency_penalty=1.0) == [5, 3, 5, 3]


class Stubborn:
    """A model of ten tokens that says 5, or else 3."""

    def next_logits(self, tokens: Sequence[int]) -> np.ndarray:
        logits = np.zeros(10)
        logits[[5, 3]] = 2.5, 1.9
        return logits


def test_generate_reads_prompts_in_pieces(demo: Path) -> None:
    """An interrupt waits for one piece; the engine's logits are those of the whole prompt, to the bit."""
    prompt = [token % 1000 for token in range(400)]
    session = Engine(demo, threads=1).session()
    read: list[int] = []
    logits: list[np.ndarray] = []

    class Watched:
        def next_logits(self, tokens: Sequence[int]) -> np.ndarray:
            read.append(len(tokens))
            logits.append(session.next_logits(tokens))
            return logits[-1]

    list(generate(Watched(), prompt, SamplingParams(max_tokens=1)))
    assert read == [256, 144]
    whole = Engine(demo, threads=1).session().next_logits(prompt)
    assert (logits[-1] == whole).all()


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
        {"frequency_penalty": float("nan")},
        {"presence_penalty": 101.0},
        {"logit_bias": ((3, -101.0),)},
        {"logit_bias": ((-3, 1.0),)},
        {"max_tokens": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**wrong)  # type: ignore[arg-type]
