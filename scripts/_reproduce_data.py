"""The data of the reproduction: made once on a CPU as compact token files, read where the arms train.

Everything is a list of token sequences with the position where scoring starts: an instruction and its
answer, a window of text, a question with one of its choices. A sequence is kept only if it fits; nothing is
truncated, nothing is packed.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from irq_export.evaluate.questions import requests_of
from irq_export.evaluate.tasks import MMLU_TOKENS, Task, load_task

__all__ = ["Choices", "Sequences", "batches", "load", "prepare"]

INSTRUCT = ("alpaca_en_demo_1k.json", "rasbt_instruction-data_1100.json", "dolly_3k.json")
HELD_OUT = 400
LONGEST = 256  # tokens of an example
BUCKET = 32  # lengths are padded to a multiple of this
SEPARATOR = "<|endoftext|>\n"  # between the books of the corpus


@dataclass(frozen=True)
class Sequences:
    """Token sequences.

    Attributes:
        ids: uint32 (n,), one after another.
        offsets: int64 (count + 1,).
        starts: int32 (count,): the first token of each that is predicted.
    """

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]], int(self.starts[index])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.diff(self.offsets)

    def first(self, count: int) -> Sequences:
        """The first sequences."""
        return Sequences(
            self.ids[: self.offsets[: count + 1][-1]], self.offsets[: count + 1], self.starts[:count]
        )

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], int]]) -> Sequences:
        """Collect (ids, start) pairs."""
        offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
        flat = np.concatenate([np.asarray(ids, np.uint32) for ids, _ in pairs])
        return cls(flat, offsets.astype(np.int64), np.array([start for _, start in pairs], np.int32))


@dataclass(frozen=True)
class Choices:
    """Multiple choice: sequence i is choice ``choice[i]`` of question ``question[i]``.

    Attributes:
        sequences: Context and choice, scored from the choice on.
        question: int32 (n,).
        gold: bool (n,).
        characters: int32 (n,): length of the choice, for the normalised score.
        subject: int32 (n,): what questions are averaged in first (MMLU), if anything.
    """

    sequences: Sequences
    question: np.ndarray
    gold: np.ndarray
    characters: np.ndarray
    subject: np.ndarray | None = None

    def first(self, questions: int) -> Choices:
        """The first questions."""
        count = int((self.question < questions).sum())
        arrays = (self.question, self.gold, self.characters, self.subject)
        rest = (None if array is None else array[:count] for array in arrays)
        return Choices(self.sequences.first(count), *rest)  # type: ignore[arg-type]


def batches(
    examples: Sequences, seeds: Sequence[int], steps: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the batches of all seeds side by side: every seed its own examples, all of one length class.

    The length class of a step is the same for every seed (the paper groups by length too), so their
    batches have one shape. Within a class every seed goes through its own permutation, again and again.

    Yields:
        tokens int64 (seeds, size, L); positions and targets int64 (seeds, n), padded with 0 and -100.
    """
    classes = np.ceil(examples.lengths / BUCKET).astype(int)
    names, counts = np.unique(classes, return_counts=True)
    enough = counts >= size
    members = {name: np.flatnonzero(classes == name) for name in names[enough]}
    share = counts[enough] / counts[enough].sum()
    schedule = np.random.default_rng(0).choice(names[enough], size=steps, p=share)
    shuffled = {seed: np.random.default_rng([1, seed]) for seed in seeds}
    waiting: dict[tuple[int, int], np.ndarray] = {}
    for name in schedule:
        length = int(name) * BUCKET
        tokens = np.zeros((len(seeds), size, length), np.int64)
        scored: list[tuple[list[int], list[int]]] = []
        for s, seed in enumerate(seeds):
            queue = waiting.get((seed, name), np.empty(0, int))
            if len(queue) < size:
                queue = np.concatenate([queue, shuffled[seed].permutation(members[name])])
            picked, waiting[seed, name] = queue[:size], queue[size:]
            positions, targets = [], []
            for row, index in enumerate(picked):
                ids, start = examples[int(index)]
                tokens[s, row, : len(ids)] = ids
                positions += range(row * length + start - 1, row * length + len(ids) - 1)
                targets += ids[start:].tolist()
            scored.append((positions, targets))
        most = max(len(p) for p, _ in scored)
        padded = [(p + [0] * (most - len(p)), t + [-100] * (most - len(t))) for p, t in scored]
        yield tokens, np.array([p for p, _ in padded]), np.array([t for _, t in padded])


# ------------------------------------------------------------------------------------------- preparation


def _instructions(data: Path) -> Iterator[tuple[str, str]]:
    for name in INSTRUCT:
        for row in json.loads((data / "instruct" / name).read_text("utf-8")):
            given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
            yield f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n", row["output"]


def _p3(data: Path) -> Iterator[tuple[str, str]]:
    with lzma.open(data / "instruct" / "p3_t0_50k.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"].rstrip() + "\n", row["completion"].removesuffix("<|endoftext|>").strip()


def _pairs(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], end: Sequence[int]
) -> list[tuple[list[int], int]]:
    """Encode (context, answer) apart, so that the answer's tokens do not depend on where it is scored."""
    contexts = tokenizer.encode_batch([context for context, _ in texts], add_special_tokens=False)
    answers = tokenizer.encode_batch([answer for _, answer in texts], add_special_tokens=False)
    return [([*c.ids, *a.ids, *end], len(c.ids)) for c, a in zip(contexts, answers, strict=True)]


def _examples(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], end: int, most: int
) -> dict[str, Sequences]:
    """Training and held-out examples that fit, no context in both."""
    texts = [pair for pair in dict(texts).items() if all(part.strip() for part in pair)]
    order = np.random.default_rng(0).permutation(len(texts))
    pairs = _pairs(tokenizer, [texts[i] for i in order], [end])
    pairs = [(ids, start) for ids, start in pairs if len(ids) <= LONGEST]
    return {"held": Sequences.of(pairs[:HELD_OUT]), "train": Sequences.of(pairs[HELD_OUT:][:most])}


def _windows(tokenizer: Tokenizer, text: str, length: int, most: int | None = None) -> Sequences:
    ids = tokenizer.encode(text if most is None else text[: most * length * 8], add_special_tokens=False).ids
    return _cut(np.array(ids, np.uint32), length, most)


def _book_windows(tokenizer: Tokenizer, books: Sequence[str], length: int, most: int) -> Sequences:
    """Windows of the books one behind the other; each book is encoded alone, as memory allows."""
    parts: list[np.ndarray] = []
    for book in books:
        parts.append(np.array(tokenizer.encode(book, add_special_tokens=False).ids, np.uint32))
        if sum(map(len, parts)) >= most * length:
            break
    return _cut(np.concatenate(parts), length, most)


def _cut(ids: np.ndarray, length: int, most: int | None) -> Sequences:
    count = len(ids) // length if most is None else min(most, len(ids) // length)
    return Sequences(
        ids[: count * length], np.arange(count + 1, dtype=np.int64) * length, np.ones(count, np.int32)
    )


def _commonsense(path: Path) -> Iterator[tuple[str, list[str], int]]:
    for row in json.loads(path.read_text("utf-8")):
        text, answer = row["instruction"], row["answer"]
        if answer in ("true", "false"):
            question = re.search(r"question:(.*?)\n\nAnswer format", text, re.DOTALL)
            if question:
                yield f"Question: {question[1].strip()}\nAnswer:", [" no", " yes"], int(answer == "true")
            continue
        found = re.search(r"question:(.*?)\n\nAnswer1:(.*?)\n\nAnswer format", text, re.DOTALL)
        if found:
            choices = [" " + choice.strip() for choice in re.split(r"Answer\d:", found[2])]
            gold = int(answer.removeprefix("answer")) - 1
            if gold < len(choices):
                yield f"Question: {found[1].strip()}\nAnswer:", choices, gold


def _hellaswag(path: Path) -> Iterator[tuple[str, list[str], int]]:
    lines = bz2.decompress(path.read_bytes()).decode("utf-8").splitlines()
    for i in range(0, len(lines) // 6 * 6, 6):
        yield lines[i], [" " + ending for ending in lines[i + 2 : i + 6]], int(lines[i + 1])


def _choices(tokenizer: Tokenizer, tasks: Sequence[tuple[str, list[str], int]]) -> Choices:
    texts = [(context, choice) for context, choices, _ in tasks for choice in choices]
    question = [i for i, (_, choices, _) in enumerate(tasks) for _ in choices]
    gold = [i == g for _, choices, g in tasks for i in range(len(choices))]
    characters = [len(choice) - 1 for _, choice in texts]
    return Choices(
        Sequences.of(_pairs(tokenizer, texts, [])),
        np.array(question, np.int32),
        np.array(gold),
        np.array(characters, np.int32),
    )


def _mmlu(tokenizer: Tokenizer, data: Path) -> Choices:
    """MMLU's validation split with five examples, the prompts of `irq-export evaluate --tasks mmlu_val`."""
    task = load_task("mmlu_val", data)
    assert isinstance(task, Task)  # noqa: S101

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    asked = [requests_of(question, encode, MMLU_TOKENS) for question in task.questions]
    pairs = [((*r.context, *r.continuation), len(r.context)) for requests in asked for r in requests]
    subjects = sorted({question.group for question in task.questions})
    each = [(i, q, c) for i, q in enumerate(task.questions) for c in range(len(q.choices))]
    return Choices(
        Sequences.of(pairs),
        np.array([i for i, _, _ in each], np.int32),
        np.array([c == q.gold for _, q, c in each]),
        np.array([len(q.choices[c]) for _, q, c in each], np.int32),
        np.array([subjects.index(q.group) for _, q, _ in each], np.int32),
    )


def _pack(values: dict[str, Sequences | Choices]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in values.items():
        sequences = value.sequences if isinstance(value, Choices) else value
        arrays |= {f"{name}.{part}": array for part, array in vars(sequences).items()}
        if isinstance(value, Choices):
            rest = {part: array for part, array in vars(value).items() if part != "sequences"}
            arrays |= {f"{name}.{part}": array for part, array in rest.items() if array is not None}
    return arrays


def load(path: Path) -> dict[str, Sequences | Choices]:
    """Read a file of :func:`prepare`."""
    with np.load(path) as file:
        arrays = dict(file)
    found: dict[str, Sequences | Choices] = {}
    for name in dict.fromkeys(key.split(".")[0] for key in arrays):
        sequences = Sequences(*(arrays[f"{name}.{part}"] for part in ("ids", "offsets", "starts")))
        rest = [arrays.get(f"{name}.{part}") for part in ("question", "gold", "characters", "subject")]
        found[name] = sequences if rest[0] is None else Choices(sequences, *rest)  # type: ignore[arg-type]
    return found


def prepare(
    data: Path, tokenizer_file: Path, end: int, output: Path, *, full: bool, books: int
) -> dict[str, int]:
    """Write the token file of one model.

    Args:
        data: The shared data directory.
        tokenizer_file: ``tokenizer.json`` of the model.
        end: Token that ends an answer.
        output: The file, ``.npz``.
        full: With p3, multiple choice and text to train the base on; otherwise a small model's share.
        books: Windows of 1024 tokens of books to train the base on (``full``).

    Returns:
        How many sequences each part has.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    parts: dict[str, Sequences | Choices] = {}
    for name, texts in {
        "instruct": list(_instructions(data)),
        **({"p3": list(_p3(data))} if full else {}),
    }.items():
        parts |= {f"{name}_{k}": v for k, v in _examples(tokenizer, texts, end, 12_000).items()}
    wiki = (data / "wikitext2" / "wiki.test.joined.txt").read_text("utf-8")
    parts["wikitext"] = _windows(tokenizer, wiki, 512)
    with lzma.open(data / "corpus" / "gutenberg_val.txt.xz", "rt", encoding="utf-8") as file:
        parts["books_val"] = _windows(tokenizer, file.read().replace(SEPARATOR, ""), 512, 128)
    with lzma.open(data / "corpus" / "gutenberg_train.txt.xz", "rt", encoding="utf-8") as file:
        parts["calibration"] = _windows(tokenizer, file.read(1_200_000).replace(SEPARATOR, ""), 512, 128)
        text = file.read(books * 1024 * 6)
    if full:
        parts["books"] = _book_windows(tokenizer, text.split(SEPARATOR), 1024, books)
        parts["mmlu"] = _mmlu(tokenizer, data)
        for name, file_name in {
            "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "openbookqa": "openbookqa"
        }.items():  # fmt: skip
            path = data / "commonsense" / f"{file_name}.test.json"
            parts[name] = _choices(tokenizer, list(_commonsense(path)))
        parts["boolq"] = _choices(
            tokenizer, list(_commonsense(data / "commonsense" / "boolq.test.json"))[:1000]
        )
        tasks = list(_hellaswag(data / "hellaswag" / "hellaswag_val_full.txt.bz2"))
        parts["hellaswag"] = _choices(tokenizer, tasks[:1000])
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output, **_pack(parts))  # type: ignore[arg-type]
    return {name: len(p.sequences if isinstance(p, Choices) else p) for name, p in parts.items()}
