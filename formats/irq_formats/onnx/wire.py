"""How much is in a protobuf message, counted before it is parsed.

Parsing turns two bytes into an object of two hundred, so the size of a file does not bound what it costs.
This walks the fields as they lie in the bytes; which of them are messages again, the schema says. Nothing is
built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from irq_formats.errors import MalformedFile

__all__ = ["check_wire"]

#: A graph of 126 layers has 68 thousand messages and 197 thousand fields; in profile stock, at most 119 and
#: 466 thousand. Parsed, a message takes some 200 bytes and a field some 32: 40 MB together.
_MAX_MESSAGES, _MAX_FIELDS = 1 << 17, 1 << 19

_VARINT, _BYTES = 0, 2  # wire types
_FIXED_BYTES = {1: 8, 5: 4}
_VARINT_BYTES = 10

#: By field number: the schema of a message, or None for numbers, which may be packed. Texts are not listed.
_Schema: TypeAlias = "dict[int, _Schema | None]"


def check_wire(data: bytes, message: Any, *, where: Path) -> None:
    """Check that a message is whole and of bounded contents.

    Args:
        data: The message.
        message: Its class, as protobuf generates it.
        where: Its file, for error messages.

    Raises:
        MalformedFile: A field leaves its message, or there are too many.
    """
    try:
        _count(data, _schema(message.DESCRIPTOR, {}))
    except OverflowError as error:
        expected = f"at most {_MAX_MESSAGES} messages and {_MAX_FIELDS} fields"
        raise MalformedFile("more than a graph has", where=where, expected=expected) from error
    except (IndexError, ValueError) as error:
        raise MalformedFile("is not an ONNX model", where=where, got=str(error)) from error


def _count(data: bytes, schema: _Schema) -> None:
    todo = [(0, len(data), schema)]  # messages: first byte, the one after the last, schema
    messages = fields = 0
    while todo:
        at, end, schema = todo.pop()
        while at < end:
            tag, at = _varint(data, at)
            number, kind = tag >> 3, tag & 7
            fields += 1
            if kind == _VARINT:
                _, at = _varint(data, at)
            elif kind == _BYTES:
                length, at = _varint(data, at)
                if number in schema:
                    inner = schema[number]
                    if inner is None:
                        fields += length
                    else:
                        messages += 1
                        todo.append((at, at + length, inner))
                at += length
            elif kind in _FIXED_BYTES:
                at += _FIXED_BYTES[kind]
            else:
                raise ValueError(f"wire type {kind}")
            if at > end:
                raise ValueError("a field leaves its message")
            if messages > _MAX_MESSAGES or fields > _MAX_FIELDS:
                raise OverflowError


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at ``at`` and where it ends."""
    if data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for index in range(_VARINT_BYTES):
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number of too many bytes")


def _schema(kind: Any, known: dict[str, _Schema]) -> _Schema:
    """Return the schema of a protobuf descriptor; messages may contain themselves."""
    if kind.full_name not in known:
        fields = known[kind.full_name] = {}
        for field in kind.fields:
            if field.message_type is not None:
                fields[field.number] = _schema(field.message_type, known)
            elif field.cpp_type != field.CPPTYPE_STRING:
                fields[field.number] = None
    return known[kind.full_name]
