"""Training files: what their rows mean.

Every format becomes a list of messages, ``{"role": "system" | "user" | "assistant", "content": text}``. The
format is told from the keys of the rows; where they fit none, or more than one, the file is refused.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_formats.errors import MalformedFile, UsageError

__all__ = ["FORMATS", "HUB_PREFIX", "Message", "detect_format", "load_conversations", "read_rows"]

Message = dict[str, str]
Row = Mapping[str, Any]

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

#: Marks the name of a data set of the hub.
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Format:
    """A known kind of row.

    Attributes:
        name: For ``--data-format``.
        required: Keys that every row has.
        forbidden: Keys that belong to another format.
        convert: Makes messages of a row; an empty list drops it.
    """

    name: str
    required: tuple[str, ...]
    forbidden: tuple[str, ...]
    convert: Callable[[Row], list[Message]]

    def fits(self, keys: set[str]) -> bool:
        """Whether rows with these keys are of this format."""
        return keys.issuperset(self.required) and keys.isdisjoint(self.forbidden)


def _pair(prompt: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _instruction(row: Row, context: str, answer: str) -> list[Message]:
    """An instruction with an optional context, kept apart so that a prompt may frame them."""
    messages = _pair(row["instruction"], row[answer])
    if row.get(context):
        messages[0]["context"] = row[context]
    return messages


_ROLES = {"human": "user", "gpt": "assistant", "prompter": "user"}


def _turns(turns: Any, role: str, text: str) -> list[Message]:
    return [{"role": _ROLES.get(turn[role], turn[role]), "content": turn[text]} for turn in turns]


_CHAT_KEYS = ("messages", "conversations", "message_id")

#: All formats but OASST, whose rows are messages of a tree.
FORMATS = (
    Format(
        "alpaca",
        ("instruction", "output"),
        ("context", "response", *_CHAT_KEYS),
        lambda row: _instruction(row, "input", "output"),
    ),
    Format(
        "dolly",
        ("instruction", "response"),
        ("output", "input", *_CHAT_KEYS),
        lambda row: _instruction(row, "context", "response"),
    ),
    Format(
        "input-output",
        ("input", "output"),
        ("instruction", "inputs", "targets", "prompt", "completion", *_CHAT_KEYS),
        lambda row: _pair(row["input"], row["output"]),
    ),
    Format(
        "input-output",
        ("inputs", "targets"),
        ("instruction", "input", "output", "prompt", "completion", *_CHAT_KEYS),
        lambda row: _pair(row["inputs"], row["targets"]),
    ),
    Format(
        "prompt-completion",
        ("prompt", "completion"),
        ("instruction", "input", "output", "inputs", "targets", *_CHAT_KEYS),
        lambda row: _pair(row["prompt"], row["completion"]),
    ),
    Format(
        "messages",
        ("messages",),
        ("instruction", "conversations", "output", "completion", "message_id"),
        lambda row: _turns(row["messages"], "role", "content"),
    ),
    Format(
        "sharegpt",
        ("conversations",),
        ("instruction", "messages", "output", "completion", "message_id"),
        lambda row: _turns(row["conversations"], "from", "value"),
    ),
    Format("oasst", ("message_id", "parent_id", "role", "text"), ("messages", "conversations"), dict),  # type: ignore[arg-type]
)


def load_conversations(source: str, data_format: str = "auto") -> tuple[str, list[list[Message]]]:
    """Read a source of training data.

    Args:
        source: A file, or ``hf:NAME[:SPLIT]`` for what ``datasets.load_dataset`` finds under a name.
        data_format: ``auto``, or the name of a format.

    Returns:
        The format, and the conversations in the order of the file.

    Raises:
        UsageError: There is no such file, or its format is not clear.
        MalformedFile: The file does not parse, or a row lacks a text.
    """
    rows = _read_hub(source) if source.startswith(HUB_PREFIX) else read_rows(Path(source))
    if not rows:
        raise MalformedFile("no rows", where=source)
    form = detect_format(rows, source, data_format)
    if form.name == "oasst":
        conversations = _oasst(rows, source)
    else:
        conversations = [_converted(form, row, f"{source}: row {i}") for i, row in enumerate(rows)]
    return form.name, [messages for messages in conversations if messages]


def read_rows(path: Path) -> list[Row]:
    """Read a JSON array or JSON Lines, plain or compressed.

    Raises:
        UsageError: There is no such file, or it has another ending.
        MalformedFile: It does not parse, or holds something else than objects.
    """
    if not path.is_file():
        raise UsageError(
            "no such file", where=path, hint=f"A data set of the hub is written {HUB_PREFIX}NAME"
        )
    suffixes = [suffix for suffix in path.suffixes if suffix not in _OPENERS]
    if not suffixes or suffixes[-1] not in (".json", ".jsonl", ".ndjson"):
        raise UsageError("unknown kind of file", where=path, expected=".json | .jsonl [.gz | .xz | .bz2]")
    rows = _parse(_read_text(path), path)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise MalformedFile(f"row {i} is not an object", where=path, got=type(row).__name__)
    return rows


def _read_text(path: Path) -> str:
    opener: Any = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise MalformedFile("does not read as text", where=path, got=error) from error
    except OSError as error:
        if error.errno is not None:  # of the system; gzip's and bz2's own have none
            raise
        raise MalformedFile("does not read as text", where=path, got=error) from error


def _parse(text: str, path: Path) -> list[Any]:
    """Read an array, or a value a line: strings may hold what else Unicode has to end a line."""
    where = str(path)
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}: line {number}"
                rows.append(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise MalformedFile("not JSON", where=where, got=error) from error
    return rows


def detect_format(rows: Sequence[Row], where: str, wanted: str = "auto") -> Format:
    """Tell the format from the keys that all rows share.

    Raises:
        UsageError: They fit no format, or several, or not the one that is wanted.
    """
    common = set.intersection(*(set(row) for row in rows))
    fitting = [form for form in FORMATS if form.fits(common)]
    if wanted != "auto":
        named = [form for form in FORMATS if form.name == wanted and common.issuperset(form.required)]
        if not named:
            raise UsageError(f"the rows are not of the format {wanted}", where=where, got=sorted(common))
        return named[0]
    if len(fitting) != 1:
        raise UsageError(
            "the format of the data is not clear",
            where=where,
            expected="; ".join(f"{form.name}: {', '.join(form.required)}" for form in FORMATS),
            got=f"keys {', '.join(sorted(common)) or 'none in common'}",
            hint="Say which with --data-format",
        )
    return fitting[0]


def _converted(form: Format, row: Row, where: str) -> list[Message]:
    """Convert one row and check its messages."""
    try:
        messages = form.convert(row)
    except (KeyError, TypeError) as error:
        raise MalformedFile(f"not a row of the format {form.name}", where=where, got=repr(error)) from error
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise MalformedFile(
                "role", where=where, expected="system | user | assistant", got=message["role"]
            )
        if not all(isinstance(text, str) for text in message.values()):
            raise MalformedFile("a message is not text", where=where, got=message)
    return messages if any(message["role"] == "assistant" for message in messages) else []


def _oasst(rows: Sequence[Row], where: str) -> list[list[Message]]:
    """Follow every tree of messages from its root along the best-ranked replies."""
    children: dict[Any, list[Row]] = {}
    for row in rows:
        children.setdefault(row["parent_id"], []).append(row)
    threads = []
    for root in children.get(None, []):
        thread: list[Message] = []
        node: Row | None = root
        while node is not None:
            thread += _turns([node], "role", "text")
            replies = children.get(node["message_id"], [])
            node = min(replies, key=lambda reply: reply.get("rank") or 0, default=None)
        while thread and thread[-1]["role"] != "assistant":
            thread.pop()
        if thread:
            threads.append(thread)
    if not threads:
        raise MalformedFile("no thread ends with the assistant", where=where)
    return threads


def _read_hub(source: str) -> list[Row]:
    """Read a data set of the hub, or of a local directory: downloaded only because of the prefix.

    Raises:
        UsageError: It is not there, has no such split, or cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        return list(load_dataset(name, split=split or "train"))
    except (DatasetsError, OSError, ValueError) as error:
        raise UsageError("no such data set", where=source, expected="hf:NAME[:SPLIT]", got=error) from error
