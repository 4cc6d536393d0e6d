"""Reading GGUF strictly: what llama.cpp accepts, minus what no honest writer produces.

Beyond ggml's own rules: sizes are bounded by the file, padding is zero, nothing follows the data,
names differ by more than case, bools are 0 or 1, and arrays are capped. Every fault is a
:class:`~irq_formats.errors.MalformedFile`. Data are read with bounded reads, never mapped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile, UsageError
from irq_formats.files import FixedFile, open_fixed
from irq_formats.gguf import rules, stock_blocks
from irq_formats.gguf.header import Header, parse_header
from irq_formats.gguf.types import GgmlType, GgufValue, ValueType

__all__ = ["GgufFile", "GgufTensor", "open_gguf"]

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SPLIT_KEYS = {"split.no", "split.count", "split.tensors.count"}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: Unique in the file.
        shape: Logical shape in numpy order (out, in): the reverse of ggml's ``ne``.
        type: Type of the data.
        offset: Absolute offset in its file, bytes.
        nbytes: Bytes of the data without padding.
        shard: Index into ``GgufFile.files``.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int
    shard: int = 0


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A checked GGUF file, or all shards of one.

    Attributes:
        files: The file, or its shards in order.
        values: Typed metadata by key, file order (of the first shard).
        tensors: Tensors by name, file order.
    """

    files: tuple[FixedFile, ...]
    values: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]

    @property
    def path(self) -> Path:
        """The file (of the first shard)."""
        return self.files[0].path

    @cached_property
    def metadata(self) -> dict[str, object]:
        """Plain values by key: str, int, float, bool, list[str] or a one-dimensional array."""
        return {key: value.value for key, value in self.values.items()}

    def read(self, name: str) -> NDArray[np.generic]:
        """Return a tensor's raw data.

        Returns:
            Its natural dtype and shape; BF16 as uint16; block types as uint8 of shape
            (..., row_bytes).

        Raises:
            UsageError: No such tensor.
            MalformedFile: The file changed since it was opened.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UsageError("no such tensor", where=self.path, got=name)
        shape = tensor.type.raw_shape(tensor.shape)
        return self.files[tensor.shard].read_array(tensor.offset, tensor.type.dtype, shape)

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """Return a tensor dequantised to float32, in its logical shape.

        Raises:
            UsageError: No such tensor.
            UnsupportedModel: Its type has no decoder here.
            MalformedFile: The file changed since it was opened.
        """
        raw = self.read(name)
        return stock_blocks.dequantize(raw, self.tensors[name].type, where=name)


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file and check all of it but the tensor data. Shards are opened from the first.

    Args:
        path: The file; of a sharded one, shard 1.

    Raises:
        UsageError: There is no such file.
        MalformedFile: The file, or a shard, breaks a rule.
    """
    first = open_fixed(path)
    header = parse_header(first)
    architecture = header.values.get(rules.ARCHITECTURE_KEY)
    if architecture is None or architecture.type is not ValueType.STR or not architecture.value:
        raise MalformedFile(
            "required key is missing or not a non-empty string",
            where=path,
            expected=rules.ARCHITECTURE_KEY,
            got=None if architecture is None else architecture.value,
        )
    if _int(header.values, "split.count", 1, first.path) != 1:
        return _open_shards(first, header)
    return GgufFile((first,), header.values, _place(first, header, 0))


def _place(file: FixedFile, header: Header, shard: int) -> dict[str, GgufTensor]:
    """Check that tensors fill the data section exactly, in order, and give them absolute offsets."""
    start = header.end + rules.padding(header.end, header.alignment)
    tensors: dict[str, GgufTensor] = {}
    end = 0  # of the last tensor's padding, bytes from start
    data_end = 0  # of the last tensor's data
    for info in header.infos:
        if info.offset != end:
            raise MalformedFile(
                f"data of {info.name} are not contiguous", where=file.path, expected=end, got=info.offset
            )
        data_end = end + info.nbytes
        if data_end > file.size - start:
            raise MalformedFile(
                f"the file ends inside the data of {info.name}",
                where=file.path,
                expected=f"{start + data_end} bytes",
                got=file.size,
            )
        end = data_end + rules.padding(data_end, header.alignment)
        tensors[info.name] = GgufTensor(
            info.name, info.shape, info.type, start + info.offset, info.nbytes, shard
        )
    _check_end(file, header, start, data_end, end)
    _check_padding(file, header.end, start)
    for info in header.infos:
        used = start + info.offset + info.nbytes
        _check_padding(file, used, used + rules.padding(info.nbytes, header.alignment))
    return tensors


def _check_end(file: FixedFile, header: Header, start: int, data_end: int, end: int) -> None:
    """Some writers pad the last tensor, some do not; nothing else may follow."""
    ends = {start + data_end, start + end} if header.infos else {header.end, start}
    if file.size not in ends:
        raise MalformedFile(
            "bytes follow the last tensor", where=file.path, expected=max(ends), got=file.size
        )


def _check_padding(file: FixedFile, begin: int, end: int) -> None:
    end = min(end, file.size)
    if begin < end and any(file.read_bytes(begin, end - begin)):
        raise MalformedFile("padding is not zero", where=file.path, got=f"bytes {begin} to {end}")


def _int(values: Mapping[str, GgufValue], key: str, default: int | None, path: Path) -> int:
    value = values[key].value if key in values else default
    if not isinstance(value, int) or isinstance(value, bool):
        raise MalformedFile("not an integer", where=path, expected=key, got=value)
    return value


def _open_shards(first: FixedFile, header: Header) -> GgufFile:
    """Open the shards 2… that belong to ``first``; they must add up to what it promises."""
    match = _SHARD_NAME.fullmatch(first.path.name)
    count = _int(header.values, "split.count", None, first.path)
    if match is None or int(match["count"]) != count or int(match["number"]) != 1:
        raise MalformedFile(
            "not the first of its shards",
            where=first.path,
            expected=f"a name ending in -00001-of-{count:05d}.gguf",
        )
    files, headers = [first], [header]
    for number in range(2, count + 1):
        path = first.path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not path.is_file():
            raise MalformedFile("a shard is missing", where=path, expected=f"{count} shards")
        files.append(open_fixed(path))
        headers.append(parse_header(files[-1]))
    tensors: dict[str, GgufTensor] = {}
    for shard, (file, part) in enumerate(zip(files, headers, strict=True)):
        _check_shard(file, part.values, header.values, shard, count)
        placed = _place(file, part, shard)
        twice = sorted(tensors.keys() & placed.keys())
        if twice:
            raise MalformedFile("tensor is in two shards", where=file.path, got=twice[0])
        tensors |= placed
    promised = _int(header.values, "split.tensors.count", None, first.path)
    if len(tensors) != promised:
        raise MalformedFile(
            "tensors are missing or left over across the shards",
            where=first.path,
            expected=promised,
            got=len(tensors),
        )
    return GgufFile(tuple(files), header.values, tensors)


def _check_shard(
    file: FixedFile,
    values: Mapping[str, GgufValue],
    first: Mapping[str, GgufValue],
    shard: int,
    count: int,
) -> None:
    numbers = _int(values, "split.no", None, file.path), _int(values, "split.count", None, file.path)
    if numbers != (shard, count):
        raise MalformedFile(
            "wrong split.no or split.count", where=file.path, expected=(shard, count), got=numbers
        )
    for key, value in values.items():  # a later shard may repeat keys of the first, not change them
        known = first.get(key)
        if key not in _SPLIT_KEYS and known is not None:
            same = (value.type, value.element) == (known.type, known.element)
            if not same or not np.array_equal(np.asarray(value.value), np.asarray(known.value)):
                raise MalformedFile("shards come from different exports", where=file.path, got=key)
