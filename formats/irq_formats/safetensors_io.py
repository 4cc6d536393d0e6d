"""safetensors, read strictly and written in streams, with numpy alone.

A file is ``u64 header length | JSON header | data``. The rules kept here are those of the format's own
README: a header of at most 100 MB, no duplicate keys, and data that cover the rest of the file exactly,
without holes or overlap. A directory holds either ``model.safetensors`` or shards with an index; shard
names come from an untrusted file and must be plain names in that directory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from irq_formats.atomic import atomic_file
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.files import FixedFile, open_fixed
from irq_formats.strict_json import parse_object

__all__ = [
    "DTYPES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "SafeTensors",
    "SafeTensorsWriter",
    "TensorRef",
    "TensorSpec",
    "open_safetensors",
    "open_sharded",
    "write_safetensors",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype[np.generic]] = {  # numpy type of the raw data
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in reversed(DTYPES.items()) if not name.startswith(("F8", "BF"))}
_MAX_HEADER_BYTES = 100_000_000
_MAX_INDEX_BYTES = 64 << 20
_METADATA = "__metadata__"
_ALIGN_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is: name, dtype (a key of ``DTYPES``) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorRef(TensorSpec):
    """Where a tensor lies.

    Attributes:
        offset: Absolute offset in its file, bytes.
        shard: Index into ``SafeTensors.files``.
    """

    offset: int = 0
    shard: int = 0


@dataclass(frozen=True, eq=False)
class SafeTensors:
    """A checked safetensors file, or all shards of a directory.

    Attributes:
        files: The file, or the shards sorted by name.
        tensors: By name, in the order of the data.
        metadata: The strings of ``__metadata__``.
    """

    files: tuple[FixedFile, ...]
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]

    def read(self, name: str) -> NDArray[np.generic]:
        """Return a tensor's data; BF16 comes as uint16, F8 as uint8.

        Raises:
            UsageError: No such tensor.
            MalformedFile: The file changed since it was opened, or a bool is not 0 or 1.
        """
        ref = self.tensors.get(name)
        if ref is None:
            raise UsageError("no such tensor", where=self.files[0].path, got=name)
        file = self.files[ref.shard]
        if ref.dtype != "BOOL":
            return file.read_array(ref.offset, DTYPES[ref.dtype], ref.shape)
        raw = file.read_array(ref.offset, np.uint8, ref.shape)
        if raw.size and raw.max() > 1:
            raise MalformedFile(f"{name} is not a bool tensor", where=file.path, got=raw.max())
        return raw.view(np.bool_)

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32 (F64 is rounded).

        Raises:
            UsageError: No such tensor.
            UnsupportedModel: Not F32, F16, BF16 or F64.
        """
        raw = self.read(name)
        dtype = self.tensors[name].dtype
        if dtype == "BF16":
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if dtype not in {"F16", "F32", "F64"}:
            raise UnsupportedModel(
                "tensor is not floating point", where=name, expected="F32, F16, BF16, F64", got=dtype
            )
        with np.errstate(over="ignore", invalid="ignore"):
            return raw.astype(np.float32, copy=False)


def open_safetensors(path: str | Path) -> SafeTensors:
    """Open one safetensors file and check its header against its size.

    Raises:
        UsageError: There is no such file.
        MalformedFile: A rule of the format is broken.
    """
    file = open_fixed(path)
    if file.size < 8:
        raise MalformedFile("not a safetensors file", where=path, expected="≥ 8 bytes", got=file.size)
    (header_bytes,) = struct.unpack("<Q", file.read_bytes(0, 8))
    limit = min(_MAX_HEADER_BYTES, file.size - 8)
    if not 2 <= header_bytes <= limit:
        raise MalformedFile(
            "wrong header length", where=path, expected=f"2 to {limit} bytes", got=header_bytes
        )
    raw = file.read_bytes(8, header_bytes)
    if not raw.startswith(b"{"):
        raise MalformedFile("header does not start with {", where=path, got=raw[:1])
    header = parse_object(raw, where=path)
    metadata = _parse_metadata(header.pop(_METADATA, {}), path)
    refs = [_parse_entry(name, entry, path) for name, entry in header.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    end = 0  # bytes of data covered so far
    tensors: dict[str, TensorRef] = {}
    for ref in refs:
        if ref.offset != end:
            raise MalformedFile(
                f"hole or overlap before {ref.name}", where=path, expected=end, got=ref.offset
            )
        end += ref.nbytes
        tensors[ref.name] = replace(ref, offset=8 + header_bytes + ref.offset)
    if 8 + header_bytes + end != file.size:
        raise MalformedFile(
            "data do not end with the file", where=path, expected=8 + header_bytes + end, got=file.size
        )
    return SafeTensors((file,), tensors, metadata)


def open_sharded(directory: str | Path) -> SafeTensors:
    """Open ``model.safetensors`` of a directory, or all shards its index names.

    Raises:
        UsageError: There is neither.
        UnsupportedModel: There are only pickled weights.
        MalformedFile: A file breaks a rule, or index and shards disagree.
    """
    directory = Path(directory)
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():
        return open_safetensors(single)
    if not index.is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
            raise UnsupportedModel(
                "only pickled weights, which can run code when loaded",
                where=directory,
                expected=SINGLE_NAME,
                hint="Convert them to safetensors first",
            )
        raise UsageError("no model here", where=directory, expected=f"{SINGLE_NAME} or {INDEX_NAME}")
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    shards = [open_safetensors(_shard_path(directory, name)) for name in names]
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        for tensor, ref in shard.tensors.items():
            if weight_map.get(tensor) != name:
                raise MalformedFile(
                    f"{tensor} is in the wrong shard, or not in the index",
                    where=directory / name,
                    expected=weight_map.get(tensor),
                    got=name,
                )
            tensors[tensor] = replace(ref, shard=number)
        if any(metadata.get(key, text) != text for key, text in shard.metadata.items()):
            raise MalformedFile("shards come from different exports", where=directory / name)
        metadata |= shard.metadata
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise MalformedFile("tensor of the index is in no shard", where=index, got=missing[0])
    return SafeTensors(tuple(shard.files[0] for shard in shards), tensors, metadata)


class SafeTensorsWriter:
    """Writes a safetensors file tensor by tensor, in any order, each exactly once.

    All tensors are declared first. Data are laid out by falling item size (then as declared), so every
    tensor is aligned to its items. Use it as a context manager inside ``atomic_file``::

        with atomic_file(path) as file, SafeTensorsWriter(file, specs, metadata) as writer:
            writer.write("a.weight", array)

    Args:
        file: Seekable binary file at position 0.
        specs: Every tensor of the file.
        metadata: Strings for ``__metadata__``.

    Raises:
        UsageError: A duplicate or reserved name, an unknown dtype, or a negative size.
    """

    def __init__(
        self, file: BinaryIO, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._file = file
        self._refs = {}  # tensors not yet written
        layout = _layout(specs)
        header = json.dumps(_header(layout, metadata or {}), ensure_ascii=False, separators=(",", ":"))
        raw = header.encode("utf-8")
        raw += b" " * (-len(raw) % _ALIGN_BYTES)
        if len(raw) > _MAX_HEADER_BYTES:
            raise UsageError("header too large", expected=f"≤ {_MAX_HEADER_BYTES}", got=len(raw))
        file.write(struct.pack("<Q", len(raw)) + raw)
        self._refs = {ref.name: replace(ref, offset=8 + len(raw) + ref.offset) for ref in layout}

    def write(self, name: str, data: NDArray[np.generic]) -> None:
        """Write one tensor; BF16 is given as uint16, F8 as uint8.

        Raises:
            UsageError: Not declared, already written, or of another dtype or shape than declared.
        """
        ref = self._refs.pop(name, None)
        if ref is None:
            raise UsageError("tensor is not declared, or already written", where=name)
        expected = DTYPES[ref.dtype]
        if (data.dtype.newbyteorder("<"), data.shape) != (expected, ref.shape):
            raise UsageError(
                "data do not match the declared tensor",
                where=name,
                expected=f"{ref.dtype} {ref.shape}",
                got=f"{data.dtype} {data.shape}",
            )
        self._file.seek(ref.offset)
        self._file.write(np.ascontiguousarray(data, expected).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Check that every declared tensor was written.

        Raises:
            UsageError: One was not.
        """
        if self._refs:
            raise UsageError("declared tensors were not written", got=sorted(self._refs)[:5])

    def __enter__(self) -> SafeTensorsWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.close()


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, NDArray[np.generic]],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write arrays in memory to a safetensors file, atomically; dtypes are taken from numpy.

    Raises:
        UsageError: A numpy type safetensors does not have.
        OutputExists: ``path`` exists and ``overwrite`` is false.
    """
    specs = []
    for name, data in tensors.items():
        dtype = _NAMES.get(data.dtype.newbyteorder("<"))
        if dtype is None:
            raise UsageError("dtype not in safetensors", where=name, got=data.dtype)
        specs.append(TensorSpec(name, dtype, data.shape))
    with (
        atomic_file(path, overwrite=overwrite) as file,
        SafeTensorsWriter(file, specs, metadata) as writer,
    ):
        for name, data in tensors.items():
            writer.write(name, data)


def _parse_metadata(metadata: object, path: str | Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedFile(f"{_METADATA} does not map strings to strings", where=path)
    return metadata


def _parse_entry(name: str, entry: object, path: str | Path) -> TensorRef:
    """Check one entry of the header; its offset is still relative to the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedFile(
            f"wrong entry for {name}", where=path, expected="dtype, shape, data_offsets", got=entry
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedFile(f"unknown dtype of {name}", where=path, got=dtype)
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise MalformedFile(f"wrong shape or offsets of {name}", where=path, got=entry)
    begin, end = offsets
    if not _has_elements(shape, (end - begin) // DTYPES[dtype].itemsize):
        raise MalformedFile(f"shape of {name} does not match its bytes", where=path, got=entry)
    ref = TensorRef(name, dtype, tuple(shape), begin)
    if ref.nbytes != end - begin:
        raise MalformedFile(
            f"bytes of {name} do not match its shape", where=path, expected=ref.nbytes, got=end - begin
        )
    return ref


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values
    )


def _has_elements(shape: Sequence[int], count: int) -> bool:
    """Whether the product of ``shape`` is ``count``, found by division."""
    if 0 in shape:
        return count == 0
    for size in shape:
        count, rest = divmod(count, size)
        if rest:
            return False
    return count == 1


def _read_index(path: Path) -> dict[str, str]:
    file = open_fixed(path)
    if file.size > _MAX_INDEX_BYTES:
        raise MalformedFile("too large", where=path, expected=f"≤ {_MAX_INDEX_BYTES} bytes", got=file.size)
    weight_map = parse_object(file.read_bytes(0, file.size), where=path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFile("no weight_map", where=path)
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise MalformedFile(
                "shard is not a plain file name", where=path, expected="NAME.safetensors", got=shard
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0")


def _shard_path(directory: Path, name: str) -> Path:
    """Return a shard's path; a link may lead only inside the directory or a hub cache's blobs."""
    path = directory / name
    if not path.is_file():
        raise MalformedFile("shard of the index is missing", where=path)
    real, home = path.resolve(), directory.resolve()
    allowed = [home] + [p.parent / "blobs" for p in (home, *home.parents) if p.name == "snapshots"]
    if real.parent not in allowed:
        raise MalformedFile("shard is a link that leaves the directory", where=path, got=real)
    return path


def _layout(specs: Sequence[TensorSpec]) -> list[TensorRef]:
    """Place tensors by falling item size; offsets are relative to the data."""
    names = set()
    for spec in specs:
        if spec.name in names or spec.name == _METADATA:
            raise UsageError("duplicate or reserved tensor name", where=spec.name)
        if spec.dtype not in DTYPES or min(spec.shape, default=0) < 0:
            raise UsageError("unknown dtype or negative size", where=spec.name, got=spec)
        names.add(spec.name)
    offset = 0
    layout = []
    for spec in sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize):
        layout.append(TensorRef(spec.name, spec.dtype, spec.shape, offset))
        offset += spec.nbytes
    return layout


def _header(layout: Sequence[TensorRef], metadata: Mapping[str, str]) -> dict[str, object]:
    header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for ref in layout:
        header[ref.name] = {
            "dtype": ref.dtype,
            "shape": list(ref.shape),
            "data_offsets": [ref.offset, ref.offset + ref.nbytes],
        }
    return header
