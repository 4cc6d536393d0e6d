"""Tasks on a scorer: from questions to measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from irq_export.evaluate.measures import Measure
from irq_export.evaluate.questions import Encode, Question, Request, requests_of
from irq_export.evaluate.scorers import Scorer
from irq_export.evaluate.tasks import Task
from irq_formats.errors import UsageError

__all__ = ["check_window", "draw", "measure_task", "measure_windows"]

F64 = NDArray[np.float64]
#: Called with requests done, requests in all, and the name of the task.
Progress = Callable[[int, int, str], None]


def draw(task: Task, limit: int | None, seed: int) -> Task:
    """Return the task with at most ``limit`` questions, drawn at random and left in their order."""
    if limit is None or limit >= len(task.questions):
        return task
    chosen = np.sort(np.random.default_rng(seed).permutation(len(task.questions))[:limit])
    return replace(task, questions=tuple(task.questions[i] for i in chosen))


def measure_task(
    task: Task, encode: Encode, scorer: Scorer, progress: Progress | None = None
) -> list[Measure]:
    """Answer the questions of a task.

    Args:
        task: Questions and metrics.
        encode: Text to tokens, the same for every model that is compared.
        scorer: The model.
        progress: Called as requests are done.

    Returns:
        One measure a metric.
    """
    room = scorer.max_length if task.max_prompt is None else min(task.max_prompt, scorer.max_length)
    requests: list[Request] = []
    for question in task.questions:
        requests += requests_of(question, encode, room)
    report = None if progress is None else lambda done: progress(done, len(requests), task.name)
    likelihoods = np.array([score.logprob for score in scorer.score(requests, report)])
    groups = np.array([question.group for question in task.questions])
    rules = {
        "acc": Measure("acc", _right(task.questions, likelihoods, per_character=False)),
        "acc_norm": Measure("acc_norm", _right(task.questions, likelihoods, per_character=True)),
        "acc_subjects": Measure(
            "acc_subjects", _right(task.questions, likelihoods, per_character=False), groups
        ),
    }
    return [rules[metric] for metric in task.metrics]


def _right(
    questions: Sequence[Question],
    likelihoods: F64,
    *,
    per_character: bool,
) -> F64:
    """1 where the most likely choice is the right one; of equal ones the first counts. float64 (n,)."""
    right, start = np.zeros(len(questions)), 0
    for i, question in enumerate(questions):
        values = likelihoods[start : start + len(question.choices)]
        start += len(question.choices)
        if per_character:
            values = values / np.array(question.lengths)
        right[i] = values.argmax() == question.gold
    return right


def check_window(window: int, longest: int) -> None:
    """Refuse a window of text that would have to be cut.

    Raises:
        UsageError: It has more tokens than ``longest``.
    """
    if window > longest:
        raise UsageError(
            "the window is longer than what the model reads",
            expected=f"at most {longest} tokens",
            got=window,
            hint="Give a shorter --window",
        )


def measure_windows(
    windows: NDArray[np.int64],
    scorer: Scorer,
    name: str,
    progress: Progress | None = None,
) -> list[Measure]:
    """Measure the perplexity of windows of tokens: the second half of each, the longer one.

    Args:
        windows: int64 ``(windows, context)``.
        scorer: The model.
        name: Of the text.
        progress: Called as windows are done.

    Raises:
        UsageError: There are no windows, or they are longer than the model's context.
    """
    if not len(windows):
        raise UsageError("the text is shorter than a window", where=name)
    check_window(windows.shape[1], scorer.max_length + 1)  # the last token is predicted, not read
    half = windows.shape[1] // 2
    requests = [Request(tuple(w[:half].tolist()), tuple(w[half:].tolist())) for w in windows]
    report = None if progress is None else lambda done: progress(done, len(requests), name)
    scored = windows.shape[1] - half  # tokens a window
    nats = np.array([-score.logprob / scored for score in scorer.score(requests, report)])
    return [Measure("perplexity", nats, exponential=True)]
