"""Parsing the GGUF header: counts, key-value pairs, tensor infos.

Every number of the file is checked before it is used: against a cap of our own, and against the bytes
that are left. Work and memory are therefore linear in the bytes of the header.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile
from irq_formats.files import FixedFile
from irq_formats.gguf import rules
from irq_formats.gguf.types import GgmlType, GgufValue, ValueType

__all__ = ["Header", "TensorInfo", "parse_header"]

_WINDOW_BYTES = 1 << 18
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
_MIN_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dims count, dim, type, offset
_COUNT = struct.Struct("<Q")
_ENUM = struct.Struct("<I")
_HEAD = struct.Struct("<4sIQQ")
# by ValueType; "x" marks strings and arrays, which are no scalars
_SCALARS = {
    kind: struct.Struct("<" + code)
    for kind, code in zip(ValueType, "BbHhIifBxxQqd", strict=True)
    if code != "x"
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor info as it stands in the file.

    Attributes:
        name: Unique in the file.
        shape: Logical shape in numpy order (reverse of the file's).
        type: Type of the data.
        offset: Bytes from the start of the data section.
        nbytes: Bytes of the data without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All that comes before the data section.

    Attributes:
        values: Metadata by key, file order.
        infos: Tensor infos, file order.
        alignment: Of the data section and of each tensor, bytes.
        end: Offset of the first byte after the last tensor info.
    """

    values: dict[str, GgufValue]
    infos: list[TensorInfo]
    alignment: int
    end: int


def parse_header(file: FixedFile) -> Header:
    """Parse and check everything before the data section.

    Raises:
        MalformedFile: Any rule of the container is broken.
    """
    cursor = _Cursor(file)
    magic, version, n_tensors, n_pairs = cursor.unpack(_HEAD, "the GGUF header")
    if magic != rules.MAGIC:
        cursor.fail("not a GGUF file", expected=rules.MAGIC, got=magic)
    if version not in (2, rules.VERSION):  # 2 differs only in not knowing big-endian files
        hint = "The file is big-endian" if version & 0xFFFF == 0 and version else None
        cursor.fail("unsupported GGUF version", expected="2 or 3", got=version, hint=hint)
    cursor.check_count(n_pairs, rules.MAX_KEYS, _MIN_PAIR_BYTES, "key-value pairs")
    cursor.check_count(n_tensors, rules.MAX_TENSORS, _MIN_INFO_BYTES, "tensors")
    values = _parse_values(cursor, n_pairs)
    alignment = _alignment(cursor, values)
    infos = _parse_infos(cursor, n_tensors)
    return Header(values, infos, alignment, cursor.offset)


class _Cursor:
    """Reads forward through a window of the file; nothing is read that is not there."""

    def __init__(self, file: FixedFile) -> None:
        self.file = file
        self.window = b""
        self.window_offset = 0  # of the window in the file, bytes
        self.position = 0  # in the window, bytes

    @property
    def offset(self) -> int:
        return self.window_offset + self.position

    @property
    def remaining(self) -> int:
        return self.file.size - self.offset

    def fail(
        self, message: str, *, expected: object = None, got: object = None, hint: str | None = None
    ) -> NoReturn:
        raise MalformedFile(message, where=self.file.path, expected=expected, got=got, hint=hint)

    def advance(self, nbytes: int, what: str) -> int:
        """Make ``nbytes`` available, step over them, return where they start in the window."""
        if nbytes > len(self.window) - self.position:
            if nbytes > self.remaining:
                self.fail(f"the file ends inside {what}", expected=f"{nbytes} bytes", got=self.remaining)
            offset = self.offset
            wanted = min(max(nbytes, _WINDOW_BYTES), self.remaining)
            self.window = self.file.read_bytes(offset, wanted)
            self.window_offset, self.position = offset, 0
        start = self.position
        self.position += nbytes
        return start

    def take(self, nbytes: int, what: str) -> bytes:
        start = self.advance(nbytes, what)
        return self.window[start : start + nbytes]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        start = self.advance(layout.size, what)
        return layout.unpack_from(self.window, start)

    def check_count(self, count: int, cap: int, item_bytes: int, what: str) -> None:
        limit = min(cap, self.remaining // item_bytes)
        if count > limit:
            self.fail(f"too many {what}", expected=f"at most {limit}", got=count)

    def string(self, cap: int, what: str) -> str:
        (nbytes,) = self.unpack(_COUNT, what)
        if nbytes > min(cap, self.remaining):
            self.fail(f"{what} is too long", expected=f"≤ {min(cap, self.remaining)} bytes", got=nbytes)
        try:
            return self.take(nbytes, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8", got=error.reason)

    def strings(self, count: int, cap: int, what: str) -> list[str]:
        """Read ``count`` strings; those that lie whole in the window without a call each."""
        found: list[str] = []
        while len(found) < count:
            window, position = self.window, self.position
            while len(found) < count:
                begin = position + 8
                end = begin + int.from_bytes(window[position:begin], "little")
                if begin > len(window) or end > len(window):
                    break
                try:
                    found.append(window[begin:end].decode("utf-8"))
                except UnicodeDecodeError:
                    break
                position = end
            self.position = position
            if len(found) < count:  # crosses the window, or is wrong
                found.append(self.string(cap, what))
        return found

    def value_type(self, what: str) -> ValueType:
        (number,) = self.unpack(_ENUM, what)
        if number >= len(ValueType):
            self.fail(f"unknown value type of {what}", expected="0 to 12", got=number)
        return ValueType(number)


def _parse_values(cursor: _Cursor, count: int) -> dict[str, GgufValue]:
    values: dict[str, GgufValue] = {}
    for index in range(count):
        key = cursor.string(rules.MAX_KEY_BYTES, f"key {index}")
        fault = rules.key_fault(key)
        if fault:
            cursor.fail(fault, got=f"key {index} {key[:80]!r}")
        if key in values:
            cursor.fail("duplicate key", got=key)
        kind = cursor.value_type(key)
        if kind is ValueType.ARRAY:
            values[key] = _parse_array(cursor, key)
        else:
            values[key] = GgufValue(kind, _parse_scalar(cursor, kind, key))
    return values


def _parse_scalar(cursor: _Cursor, kind: ValueType, key: str) -> str | int | float | bool:
    if kind is ValueType.STR:
        return cursor.string(rules.MAX_STRING_BYTES, f"value of {key}")
    value: int | float = cursor.unpack(_SCALARS[kind], key)[0]
    if kind is ValueType.BOOL:
        if value > 1:
            cursor.fail(f"not a bool: {key}", expected="0 or 1", got=value)
        return bool(value)
    return value


def _parse_array(cursor: _Cursor, key: str) -> GgufValue:
    element = cursor.value_type(f"elements of {key}")
    if element is ValueType.ARRAY:
        cursor.fail(f"array of arrays in {key}")
    (count,) = cursor.unpack(_COUNT, f"length of {key}")
    item_bytes = 8 if element is ValueType.STR else element.dtype.itemsize
    cap = rules.MAX_STRINGS if element is ValueType.STR else rules.MAX_ARRAY
    cursor.check_count(count, cap, item_bytes, f"elements in {key}")
    if element is ValueType.STR:
        strings = cursor.strings(count, rules.MAX_STRING_BYTES, f"a string of {key}")
        return GgufValue(ValueType.ARRAY, strings, element)
    raw = np.frombuffer(cursor.take(count * item_bytes, key), np.uint8)
    if element is ValueType.BOOL and raw.size and raw.max() > 1:
        cursor.fail(f"not a bool: {key}", expected="0 or 1", got=raw.max())
    array: NDArray[np.generic] = raw.view(element.dtype)
    return GgufValue(ValueType.ARRAY, array, element)


def _alignment(cursor: _Cursor, values: dict[str, GgufValue]) -> int:
    given = values.get(rules.ALIGNMENT_KEY)
    if given is None:
        return rules.DEFAULT_ALIGNMENT
    fault = rules.alignment_fault(given.value)
    if given.type is not ValueType.U32:
        fault = "alignment is not U32"
    if fault:
        cursor.fail(fault, got=given.value)
    return int(given.value)  # type: ignore[arg-type]


def _parse_infos(cursor: _Cursor, count: int) -> list[TensorInfo]:
    infos: list[TensorInfo] = []
    seen: dict[str, str] = {}  # casefolded name: name
    for index in range(count):
        info = _parse_info(cursor, index)
        other = seen.setdefault(info.name.casefold(), info.name)
        if len(seen) == index:
            fault = "duplicate tensor" if other == info.name else "tensors differ only by case"
            cursor.fail(fault, got=f"{info.name} and {other}")
        infos.append(info)
    return infos


def _parse_info(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.string(rules.MAX_NAME_BYTES, f"name of tensor {index}")
    fault = rules.name_fault(name)
    if fault:
        cursor.fail(fault, got=f"tensor {index} {name!r}")
    (n_dims,) = cursor.unpack(_ENUM, f"dimensions of {name}")
    if not 1 <= n_dims <= rules.MAX_DIMS:
        cursor.fail(f"wrong number of dimensions of {name}", expected="1 to 4", got=n_dims)
    shape = cursor.unpack(struct.Struct(f"<{n_dims}Q"), f"dimensions of {name}")[::-1]
    (type_id,) = cursor.unpack(_ENUM, f"type of {name}")
    if type_id not in GgmlType.__members__.values():
        cursor.fail(f"unknown tensor type of {name}", got=type_id)
    (offset,) = cursor.unpack(_COUNT, f"offset of {name}")
    tensor_type = GgmlType(type_id)
    if shape[-1] % tensor_type.block_size:
        cursor.fail(
            f"a row of {name} is not a whole number of {tensor_type.name} blocks",
            expected=f"a multiple of {tensor_type.block_size}",
            got=shape[-1],
        )
    _check_elements(cursor, name, shape, tensor_type)
    return TensorInfo(name, shape, tensor_type, offset, tensor_type.nbytes(shape))


def _check_elements(cursor: _Cursor, name: str, shape: tuple[int, ...], tensor_type: GgmlType) -> None:
    """Bound the element count by the bytes on disk, by division, before it is ever multiplied."""
    limit = cursor.file.size // tensor_type.block_bytes * tensor_type.block_size  # elements
    for size in shape:
        if size == 0:
            cursor.fail(f"empty dimension of {name}", got=shape)
        limit //= size
    if limit == 0:
        cursor.fail(f"{name} is larger than the file", got=f"{shape} {tensor_type.name}")
    if math.prod(shape) * tensor_type.block_bytes > cursor.file.size * tensor_type.block_size:
        cursor.fail(f"{name} is larger than the file", got=f"{shape} {tensor_type.name}")
