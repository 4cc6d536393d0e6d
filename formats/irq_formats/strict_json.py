"""JSON as untrusted input: UTF-8 only, no duplicate keys, no NaN, one exception type."""

from __future__ import annotations

import json
import re
from pathlib import Path

from irq_formats.errors import MalformedFile

__all__ = ["parse_object"]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, *, where: str | Path) -> dict[str, object]:
    """Parse a JSON object strictly.

    Args:
        data: The document.
        where: Named in the error message.

    Raises:
        MalformedFile: Not UTF-8, not JSON, a duplicate key, NaN or Infinity, or not an object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise MalformedFile(f"duplicate JSON key {key!r}", where=where)
                seen.add(key)
        return fields

    def constant(name: str) -> object:
        raise MalformedFile(f"JSON has no {name}", where=where)

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise MalformedFile("not valid JSON", where=where, got=error) from error
    if _SURROGATE.search(data):
        _check_text(document, where)
    if not isinstance(document, dict):
        raise MalformedFile(
            "wrong JSON document", where=where, expected="an object", got=type(document).__name__
        )
    return document


def _check_text(document: object, where: str | Path) -> None:
    """Raise MalformedFile if an escape names half a character, which no UTF-8 file can hold."""
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedFile("not valid JSON", where=where, got="half of a surrogate pair") from error
