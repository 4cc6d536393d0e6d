"""Benchmark files become the same questions in whatever form they come; measures know their errors."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from irq_export.evaluate.harness import draw, measure_task, measure_windows
from irq_export.evaluate.measures import Measure, difference
from irq_export.evaluate.questions import Question, Request
from irq_export.evaluate.scorers import Score
from irq_export.evaluate.tasks import TASKS, Task, TextTask, load_task
from irq_formats.errors import MalformedFile, UsageError

OPTIONS = ["red hats", "green cats", "blue bats"]
#: task -> (the row as the hub has it, the row as LLM-Adapters has it, file of the one, of the other)
FORMS = {
    "arc_easy": (
        {"question": "Why?", "choices": {"text": OPTIONS, "label": ["A", "B", "C"]}, "answerKey": "C"},
        {
            "instruction": "Please choose the correct answer to the question: Why?\n\nAnswer1: red hats "
            "Answer2: green cats Answer3: blue bats\n\nAnswer format: answer1/answer2/answer3",
            "answer": "answer3",
        },
        "arc_easy/test.jsonl",
        "commonsense/ARC-Easy.test.json",
    ),
    "openbookqa": (
        {
            "question_stem": "They: ",
            "choices": {"text": OPTIONS, "label": ["A", "B", "C"]},
            "answerKey": " B",
        },
        {
            "instruction": "Please choose the correct answer to the question: They:\n\nAnswer1: red hats "
            "Answer2: green cats Answer3: blue bats\n\nAnswer format: answer1/answer2/answer3",
            "answer": "answer2",
        },
        "openbookqa/test.jsonl",
        "commonsense/openbookqa.test.json",
    ),
    "piqa": (
        {"goal": "To sew", "sol1": "Use a needle.", "sol2": "Use a spoon.", "label": 0},
        {
            "instruction": "Please choose the correct solution to the question: To sew\n\nSolution1: Use a "
            "needle.\n\nSolution2: Use a spoon.\n\nAnswer format: solution1/solution2",
            "answer": "solution1",
        },
        "piqa/validation.jsonl",
        "commonsense/piqa.test.json",
    ),
    "winogrande": (
        {"sentence": "Ann beat Sue as _ was fast .", "option1": "Ann", "option2": "Sue", "answer": "1"},
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given "
            "sentence: Ann beat Sue as _ was fast .\n\nOption1: Ann Option2: Sue "
            "Answer format: option1/option2",
            "answer": "option1",
        },
        "winogrande/validation.jsonl",
        "commonsense/winogrande.test.json",
    ),
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def questions(name: str, folder: Path) -> tuple[Question, ...]:
    task = load_task(name, folder)
    assert isinstance(task, Task)
    return task.questions


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_give_the_same_question(name: str, tmp_path: Path) -> None:
    hub, instruction, hub_file, instruction_file = FORMS[name]
    write(tmp_path / "a" / hub_file, json.dumps(hub) + "\n")
    write(tmp_path / "b" / instruction_file, json.dumps([instruction]))
    (first,), (second,) = questions(name, tmp_path / "a"), questions(name, tmp_path / "b")
    if name == "openbookqa":  # the blank at its end belongs to the continuation anyway
        assert [context.rstrip() for context in first.contexts] == list(second.contexts)
        assert (first.choices, first.gold) == (second.choices, second.gold)
    else:
        assert first == second


def test_winogrande_scores_what_follows_the_gap(tmp_path: Path) -> None:
    write(tmp_path / "winogrande/validation.jsonl", json.dumps(FORMS["winogrande"][0]))
    (question,) = questions("winogrande", tmp_path)
    assert question.contexts == ("Ann beat Sue as Ann", "Ann beat Sue as Sue")
    assert question.choices == ("was fast .",) * 2
    assert question.gold == 0


def test_boolq_with_and_without_passages(tmp_path: Path) -> None:
    row = {"passage": "Seas are salty.", "question": "is the sea salty", "label": 1}
    write(tmp_path / "boolq/validation.jsonl", json.dumps(row))
    task = load_task("boolq", tmp_path)
    assert isinstance(task, Task)
    assert task.questions[0].contexts[0] == "Seas are salty.\nQuestion: is the sea salty?\nAnswer:"
    assert (task.questions[0].choices, task.questions[0].gold, task.note) == (("no", "yes"), 1, "")


def test_mmlu_prompt(tmp_path: Path) -> None:
    def row(i: int) -> str:
        return json.dumps(
            {"subject": "sea_life", "question": f" Q{i}? ", "choices": list("wxyz"), "answer": i % 4}
        )

    write(tmp_path / "mmlu/dev.jsonl", "\n".join(map(row, range(7))))
    write(tmp_path / "mmlu/val.jsonl", row(9))
    (question,) = questions("mmlu_val", tmp_path)
    text = question.header + "".join(question.shots) + question.contexts[0]
    assert text.startswith(
        "The following are multiple choice questions (with answers) about sea life.\n\nQ0?\nA. w\n"
    )
    assert text.endswith("D. z\nAnswer: A\n\nQ9?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert len(question.shots) == 5
    assert (question.choices, question.gold, question.group) == (("A", "B", "C", "D"), 1, "sea_life")


def test_hellaswag_text_and_rows(tmp_path: Path) -> None:
    text = "Sew: A man sits. he\n2\n" + "".join(f"ends {i}.\n" for i in range(4))
    path = tmp_path / "a/hellaswag/hellaswag_val_full.txt.bz2"
    path.parent.mkdir(parents=True)
    path.write_bytes(bz2.compress(text.encode()))
    (plain,) = questions("hellaswag", tmp_path / "a")
    row = {"activity_label": "Sew", "ctx_a": "A man sits.", "ctx_b": "he", "label": "2"}
    endings = [f"[step] ends  {i}." for i in range(4)]
    write(tmp_path / "b/hellaswag/validation.jsonl", json.dumps({**row, "endings": endings}))
    (hub,) = questions("hellaswag", tmp_path / "b")
    assert plain.contexts[0] == "Sew: A man sits. he"
    assert hub.contexts[0] == "Sew: A man sits. He"
    assert (plain.choices, plain.gold) == (tuple(f"ends {i}." for i in range(4)), 2)
    assert [choice.strip() for choice in hub.choices] == list(plain.choices)


#: What the files of the shared data hold, counted with other tools.
COUNTS = {
    "mmlu": 14042,
    "mmlu_val": 1531,
    "hellaswag": 10042,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "boolq": 3270,
    "openbookqa": 500,
}


@pytest.mark.parametrize("name", COUNTS)
def test_shared_files(name: str, shared_data: Path) -> None:
    found = questions(name, shared_data)
    assert len(found) == COUNTS[name]
    if name != "mmlu":  # its first 57 questions hold a row whose choices repeat
        assert all(choice for question in found for choice in question.choices)
    gold = np.bincount([question.gold for question in found])
    assert gold.max() / gold.sum() < 0.65  # a reader that finds the same answer everywhere would show


def test_wikitext(shared_data: Path) -> None:
    task = load_task("wikitext2", shared_data)
    assert isinstance(task, TextTask)
    assert "Robert Boulter" in task.text[:100]


BROKEN: dict[str, Callable[[dict[str, object]], object]] = {
    "no gold": lambda row: row.update(answerKey="E"),
    "missing field": lambda row: row.pop("question"),
    "wrong type": lambda row: row.update(choices=3),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_rows_are_named(how: str, tmp_path: Path) -> None:
    row = json.loads(json.dumps(FORMS["arc_easy"][0]))
    BROKEN[how](row)
    write(tmp_path / "arc_easy/test.jsonl", json.dumps(FORMS["arc_easy"][0]) + "\n" + json.dumps(row))
    with pytest.raises(MalformedFile, match="row 2"):
        load_task("arc_easy", tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '[{"instruction": "Answer1: x", "answer": "answer2"}]'])
def test_broken_files(text: str, tmp_path: Path) -> None:
    write(tmp_path / "commonsense/ARC-Easy.test.json", text)
    with pytest.raises(MalformedFile):
        load_task("arc_easy", tmp_path)


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """Strings of web text hold separators that ``str.splitlines`` takes for the end of a line."""
    row: dict[str, object] = {**FORMS["arc_easy"][0], "question": "a\u2028b\u2029c\x85d"}
    line = json.dumps(row, ensure_ascii=False)
    write(tmp_path / "arc_easy/test.jsonl", f"{line}\r\n\n{line}\n")
    task = load_task("arc_easy", tmp_path)
    assert isinstance(task, Task)
    assert [question.contexts[0] for question in task.questions] == [
        "Question: a\u2028b\u2029c\x85d\nAnswer:"
    ] * 2
    write(tmp_path / "arc_easy/test.jsonl", f"{line}\n\n{line[:-1]}\n")
    with pytest.raises(MalformedFile, match="line 3: not JSON"):
        load_task("arc_easy", tmp_path)
    write(tmp_path / "arc_easy/test.jsonl", "[" * 100_000)
    with pytest.raises(MalformedFile, match="not JSON"):
        load_task("arc_easy", tmp_path)


@pytest.mark.parametrize("suffix", [".bz2", ".gz", ".xz"])
def test_damaged_archives_are_named(suffix: str, tmp_path: Path) -> None:
    openers = {".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress}
    whole = openers[suffix](json.dumps([FORMS["arc_easy"][0]]).encode() * 50)
    path = tmp_path / f"arc_easy/test.jsonl{suffix}"
    path.parent.mkdir()
    for data in (b"no archive", whole[:-20], whole[:20] + b"\xff" * 20 + whole[40:]):
        path.write_bytes(data)
        with pytest.raises(MalformedFile, match=re.escape(str(path))):
            load_task("arc_easy", tmp_path)


def test_absent_files_and_tasks(tmp_path: Path) -> None:
    for name in TASKS:
        with pytest.raises(UsageError, match="nothing is downloaded"):
            load_task(name, tmp_path)
    with pytest.raises(UsageError, match="unknown task"):
        load_task("gsm8k", tmp_path)


class FixedScorer:
    """Answers with given likelihoods."""

    name, max_length = "fixed", 100

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def score(self, requests: list[Request], progress: object = None) -> list[Score]:
        assert len(requests) == len(self.values)
        return [Score(value, None) for value in self.values]


def test_acc_and_acc_norm() -> None:
    """The long right answer has the lower likelihood and the higher one per character."""
    question = Question(("Q",) * 2, ("ab", "abcdefgh"), 1)
    task = Task("t", (question, question), ("acc", "acc_norm"))
    scorer = FixedScorer([-2.0, -4.0, -2.0, -1.0])
    acc, acc_norm = measure_task(task, lambda text: list(text.encode()), scorer)
    assert acc.samples.tolist() == [0, 1]
    assert acc_norm.samples.tolist() == [1, 1]


def test_windows_that_a_runtime_would_cut_are_refused() -> None:
    """Of a window of 101 tokens a model of 100 positions reads all but the last; one more has no room."""
    (measure,) = measure_windows(np.zeros((2, 101), np.int64), FixedScorer([-51.0, -102.0]), "text")
    np.testing.assert_array_equal(measure.samples, [1.0, 2.0])
    with pytest.raises(UsageError, match="at most 101 tokens, got 102"):
        measure_windows(np.zeros((2, 102), np.int64), FixedScorer([]), "text")


def test_drawing_is_seeded() -> None:
    task = Task("t", tuple(Question(("Q",), (str(i),), 0) for i in range(50)), ("acc",))
    first, second = draw(task, 9, 1).questions, draw(task, 9, 2).questions
    assert first == draw(task, 9, 1).questions
    assert first != second
    assert [int(q.choices[0]) for q in first] == sorted(int(q.choices[0]) for q in first)
    assert draw(task, 50, 1) is task


def test_standard_errors() -> None:
    rng = np.random.default_rng(0)
    samples = (rng.random(200) < 0.3).astype(np.float64)
    measure = Measure("acc", samples)
    assert measure.value == samples.mean()
    assert measure.stderr == pytest.approx(samples.std(ddof=1) / np.sqrt(200))
    nats = rng.normal(3, 0.2, 200)
    perplexity = Measure("perplexity", nats, exponential=True)
    assert perplexity.value == pytest.approx(np.exp(nats.mean()))
    assert perplexity.stderr == pytest.approx(np.exp(nats.mean()) * nats.std(ddof=1) / np.sqrt(200))
    assert Measure("acc", samples[:1]).stderr is None


def test_mean_of_subjects() -> None:
    samples = np.array([1.0, 0, 1, 1, 0, 0])
    groups = np.array(["a", "b", "a", "a", "b", "b"])
    measure = Measure("acc_subjects", samples, groups)
    assert measure.value == pytest.approx(0.5)
    assert measure.stderr == pytest.approx(0)  # both subjects are unanimous: nothing varies inside them
    mixed = Measure("acc_subjects", np.array([1.0, 0, 0, 1]), np.array(["a", "a", "b", "b"]))
    assert mixed.stderr == pytest.approx(0.5 / np.sqrt(3))  # as of four samples with deviation 1/2
    assert Measure("acc_subjects", samples[:2], groups[:2]).stderr is None


def test_pairs_are_sharper_than_their_halves() -> None:
    """Two models that differ in 4 of 400 answers: the error is that of the four."""
    rng = np.random.default_rng(1)
    first = (rng.random(400) < 0.5).astype(np.float64)
    second = first.copy()
    second[np.flatnonzero(first)[:4]] = 0
    change = difference(Measure("acc", first), Measure("acc", second))
    assert change.value == pytest.approx(-0.01)
    assert change.stderr == pytest.approx((second - first).std(ddof=1) / 20)
    assert change.stderr < 0.3 * (Measure("acc", first).stderr or 0)
    with pytest.raises(UsageError, match="paired"):
        difference(Measure("acc", first), Measure("acc", first[1:]))
