"""Rows of benchmark files: JSON, JSON lines, and llama.cpp's text form of HellaSwag.

Besides the fields of the data sets on the Hugging Face hub, the instruction form is understood in which the
commonsense benchmarks travel with LLM-Adapters (arXiv 2304.01933): question and options inside one
``instruction``, the right one under ``answer``. It is taken apart, so that both give the same questions.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irq_export.evaluate.questions import Question
from irq_formats.errors import MalformedFile, UsageError

__all__ = [
    "Row",
    "find_file",
    "hellaswag_text",
    "instruction_row",
    "read_questions",
    "read_rows",
    "read_text",
]

Row = Mapping[str, Any]

_OPENERS: dict[str, Callable[..., Any]] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
_COMPRESSIONS = ("", *_OPENERS)
_HELLASWAG_LINES = 6
_ANSWER = re.compile(r"(answer|solution|option|ending)(\d+)")


def find_file(data_dir: Path, candidates: Sequence[str]) -> Path:
    """Return the first of some relative paths that exists, compressed or not.

    Raises:
        UsageError: None does.
    """
    for candidate in candidates:
        for suffix in _COMPRESSIONS:
            path = data_dir / f"{candidate}{suffix}"
            if path.is_file():
                return path
    raise UsageError(
        "the task's file is not there",
        where=data_dir,
        expected=" or ".join(candidates),
        hint="Put it there yourself: nothing is downloaded",
    )


def read_text(path: Path) -> str:
    """Return a text file, decompressed by its suffix.

    Raises:
        MalformedFile: It is not UTF-8, or not what its suffix says.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text: str = file.read()
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        raise MalformedFile("cannot be read as text", where=path, got=error) from error
    return text


def read_rows(path: Path) -> list[Row]:
    """Return the objects of a JSON array or of JSON lines.

    Raises:
        MalformedFile: Not JSON, or not objects.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        found = _parse(text, str(path))
    else:  # not splitlines(): strings hold U+2028 and its like as they are
        lines = enumerate(text.split("\n"), 1)
        found = [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not found or not all(isinstance(row, dict) for row in found):
        raise MalformedFile("no rows", where=path, expected="JSON objects")
    return list(found)


def _parse(text: str, where: str) -> Any:
    """Parse JSON.

    Raises:
        MalformedFile: It is none, or nested too deeply to be a row.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedFile("not JSON", where=where, got=error) from error


def read_questions(path: Path, parse: Callable[[Row], Question]) -> list[Question]:
    """Return one question a row.

    Raises:
        MalformedFile: A row lacks a field or breaks its form; the message names the row.
    """
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            question = parse(row)
            if not 0 <= question.gold < len(question.choices):
                raise ValueError(f"answer {question.gold} of {len(question.choices)}")
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise MalformedFile(
                "not a question", where=f"{path}, row {number}", got=f"{type(error).__name__}: {error}"
            ) from error
        questions.append(question)
    return questions


def instruction_row(row: Row) -> tuple[str, list[str], int]:
    """Take an LLM-Adapters instruction apart.

    Returns:
        The question, the options, and the index of the right one.

    Raises:
        ValueError: The instruction is not of that form.
    """
    match = _ANSWER.fullmatch(row["answer"])
    if match is None:
        raise ValueError(f"answer {row['answer']!r}")
    word, right = match[1].capitalize(), int(match[2])
    body, _, form = row["instruction"].rpartition(f"{word} format:")
    if not body:  # every word but "Answer" is asked for in this one's format too
        body, _, form = row["instruction"].rpartition("Answer format:")
    _, _, body = body.partition(": ")
    question, *parts = re.split(rf"\s*\b{word}(\d+): ", body)
    numbers = [int(number) for number in parts[0::2]]
    options = [text.strip() for text in parts[1::2]]
    if not options or numbers != list(range(1, len(options) + 1)) or form.count("/") != len(options) - 1:
        raise ValueError(f"{len(options)} options found, {form.strip()!r} announced")
    return question.strip(), options, right - 1


def hellaswag_text(path: Path) -> Iterator[Question]:
    """Yield the questions of llama.cpp's file: six lines each, context, index of the gold ending, endings.

    Raises:
        MalformedFile: The number of lines is wrong, or an index is none.
    """
    lines = read_text(path).rstrip("\n").split("\n")
    if len(lines) % _HELLASWAG_LINES:
        raise MalformedFile("lines", where=path, expected="six a question", got=len(lines))
    for i in range(0, len(lines), _HELLASWAG_LINES):
        context, gold, *endings = lines[i : i + _HELLASWAG_LINES]
        if gold not in ("0", "1", "2", "3"):
            raise MalformedFile("gold ending", where=f"{path}, line {i + 2}", expected="0 to 3", got=gold)
        yield Question((context,) * 4, tuple(endings), int(gold))
