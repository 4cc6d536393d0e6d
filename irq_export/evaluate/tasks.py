"""The benchmarks, with the prompts of EleutherAI's lm-evaluation-harness 0.4 (checked by a test).

MMLU serves both protocols in use: QLoRA's callback takes the validation split and the mean over subjects,
Hendrycks' script the test split and the mean over questions; five examples of the development split, fewer
where they do not fit into 2048 tokens. Every run reports both means; the split is the task's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from irq_export.evaluate.questions import Question
from irq_export.evaluate.readers import (
    Row,
    find_file,
    hellaswag_text,
    instruction_row,
    read_questions,
    read_rows,
    read_text,
)
from irq_formats.errors import MalformedFile, UsageError

__all__ = ["MMLU_TOKENS", "TASKS", "Task", "TextTask", "load_task"]

#: Tokens that an MMLU prompt may have, in both protocols.
MMLU_TOKENS = 2048
_SHOTS = 5
_LETTERS = "ABCD"


@dataclass(frozen=True)
class Task:
    """A multiple-choice benchmark.

    Attributes:
        name: Its name in lm-evaluation-harness, where it has one.
        questions: In the file's order.
        metrics: ``acc``, ``acc_norm`` (likelihood per character), ``acc_subjects`` (mean over groups).
        max_prompt: Tokens that examples may fill a prompt up to; None: as many as the model takes.
        note: What makes its numbers differ from the usual ones, or empty.
    """

    name: str
    questions: tuple[Question, ...]
    metrics: tuple[str, ...]
    max_prompt: int | None = None
    note: str = ""


@dataclass(frozen=True)
class TextTask:
    """A text whose perplexity is measured."""

    name: str
    text: str
    note: str = ""


def load_task(name: str, data_dir: str | Path) -> Task | TextTask:
    """Read a benchmark from local files.

    Args:
        name: One of :data:`TASKS`.
        data_dir: Folder that holds the task's file under one of its usual paths.

    Raises:
        UsageError: Unknown task, or its file is not there.
        MalformedFile: The file is not what the task needs.
    """
    if name not in TASKS:
        raise UsageError("unknown task", expected=" | ".join(TASKS), got=name)
    return TASKS[name](Path(data_dir))


def _from_rows(
    name: str, files: Sequence[str], parse: Callable[[Row], Question], *metrics: str
) -> Callable[[Path], Task]:
    def load(data_dir: Path) -> Task:
        return Task(name, tuple(read_questions(find_file(data_dir, files), parse)), metrics)

    return load


def _plain(context: str, choices: Sequence[str], gold: int) -> Question:
    return Question((context,) * len(choices), tuple(choices), gold)


def _arc(row: Row) -> Question:
    if "instruction" in row:
        question, options, gold = instruction_row(row)
    else:
        question, options = row["question"], row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"])
    return _plain(f"Question: {question}\nAnswer:", options, gold)


def _openbookqa(row: Row) -> Question:
    if "instruction" in row:
        return _plain(*instruction_row(row))
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return _plain(row["question_stem"], row["choices"]["text"], gold)


def _piqa(row: Row) -> Question:
    if "instruction" in row:
        goal, options, gold = instruction_row(row)
    else:
        goal, options, gold = row["goal"], [row["sol1"], row["sol2"]], int(row["label"])
    return _plain(f"Question: {goal}\nAnswer:", options, gold)


def _winogrande(row: Row) -> Question:
    """The option stands in the context; what follows the gap is scored."""
    if "instruction" in row:
        sentence, options, gold = instruction_row(row)
    else:
        sentence, options, gold = row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1
    before, gap, after = sentence.partition("_")
    if not gap or not after.strip():
        raise ValueError("nothing to score behind a gap")
    return Question(tuple(before + option for option in options), (after.strip(),) * len(options), gold)


def _boolq(row: Row) -> Question:
    if "instruction" in row:
        match = re.fullmatch(r".*?question: (.*?)\??\s*Answer format: true/false", row["instruction"], re.S)
        if match is None or row["answer"] not in ("true", "false"):
            raise ValueError("not a yes/no question")
        return _plain(f"Question: {match[1]}?\nAnswer:", ("no", "yes"), int(row["answer"] == "true"))
    gold = int(row["label"] if "label" in row else row["answer"])
    return _plain(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), gold)


def _load_boolq(data_dir: Path) -> Task:
    files = ("boolq/validation.jsonl", "commonsense/boolq.test.json")
    questions = read_questions(find_file(data_dir, files), _boolq)
    closed = all(question.contexts[0].startswith("Question: ") for question in questions)
    note = "closed book: the file carries no passages" if closed else ""
    return Task("boolq", tuple(questions), ("acc",), note=note)


def _clean(text: str) -> str:
    """Take the marks of WikiHow's pages out of HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _plain(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _load_hellaswag(data_dir: Path) -> Task:
    path = find_file(data_dir, ("hellaswag/validation.jsonl", "hellaswag/hellaswag_val_full.txt"))
    metrics = ("acc", "acc_norm")
    if ".jsonl" in path.suffixes:
        return Task("hellaswag", tuple(read_questions(path, _hellaswag)), metrics)
    note = "llama.cpp's file: the last sentence of a context keeps its lower case"
    return Task("hellaswag", tuple(hellaswag_text(path)), metrics, note=note)


def _mmlu_text(row: Row) -> str:
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"], strict=True)
    )
    return f"{row['question'].strip()}\n{options}Answer:"


def _load_mmlu(split: str) -> Callable[[Path], Task]:
    def load(data_dir: Path) -> Task:
        examples: dict[str, list[str]] = {}
        dev = find_file(data_dir, ("mmlu/dev.jsonl",))
        try:
            for row in read_rows(dev):
                text = f"{_mmlu_text(row)} {_LETTERS[row['answer']]}\n\n"
                examples.setdefault(row["subject"], []).append(text)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise MalformedFile("not MMLU", where=dev, got=f"{type(error).__name__}: {error}") from error

        def parse(row: Row) -> Question:
            subject = row["subject"]
            topic = subject.replace("_", " ")
            return Question(
                (_mmlu_text(row),) * 4,
                tuple(_LETTERS),
                row["answer"],
                group=subject,
                header=f"The following are multiple choice questions (with answers) about {topic}.\n\n",
                shots=tuple(examples[subject][:_SHOTS]),
            )

        questions = read_questions(find_file(data_dir, (f"mmlu/{split}.jsonl",)), parse)
        name = "mmlu" if split == "test" else f"mmlu_{split}"
        return Task(name, tuple(questions), ("acc", "acc_subjects"), max_prompt=MMLU_TOKENS)

    return load


def _load_wikitext(data_dir: Path) -> TextTask:
    path = find_file(data_dir, ("wikitext2/wiki.test.raw",))
    return TextTask("wikitext2", read_text(path), note="llama.cpp's convention: second half of each window")


#: Name -> reader of its files below a data folder.
TASKS: dict[str, Callable[[Path], Task | TextTask]] = {
    "wikitext2": _load_wikitext,
    "mmlu": _load_mmlu("test"),
    "mmlu_val": _load_mmlu("val"),
    "hellaswag": _load_hellaswag,
    "piqa": _from_rows(
        "piqa", ("piqa/validation.jsonl", "commonsense/piqa.test.json"), _piqa, "acc", "acc_norm"
    ),
    "winogrande": _from_rows(
        "winogrande", ("winogrande/validation.jsonl", "commonsense/winogrande.test.json"), _winogrande, "acc"
    ),
    "arc_easy": _from_rows(
        "arc_easy", ("arc_easy/test.jsonl", "commonsense/ARC-Easy.test.json"), _arc, "acc", "acc_norm"
    ),
    "arc_challenge": _from_rows(
        "arc_challenge",
        ("arc_challenge/test.jsonl", "commonsense/ARC-Challenge.test.json"),
        _arc,
        "acc",
        "acc_norm",
    ),
    "boolq": _load_boolq,
    "openbookqa": _from_rows(
        "openbookqa",
        ("openbookqa/test.jsonl", "commonsense/openbookqa.test.json"),
        _openbookqa,
        "acc",
        "acc_norm",
    ),
}
