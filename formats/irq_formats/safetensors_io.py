"""safetensors, read strictly and written in streams, with numpy alone.

A file is ``u64 header length | JSON header | data``. The rules kept here are those of the format's own
README: a header of at most 100 MB, no duplicate keys, and data that cover the rest of the file exactly,
without holes or overlap. A directory holds either ``model.safetensors`` or shards with an index; shard
names come from an untrusted file and must be plain names in that directory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.files import FixedFile, open_fixed
from irq_formats.safetensors_types import (
    DTYPES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    TensorRef,
    TensorSpec,
)
from irq_formats.safetensors_writer import SafeTensorsWriter, write_safetensors
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

_MAX_INDEX_BYTES = 64 << 20


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
    limit = min(MAX_HEADER_BYTES, file.size - 8)
    if not 2 <= header_bytes <= limit:
        raise MalformedFile(
            "wrong header length", where=path, expected=f"2 to {limit} bytes", got=header_bytes
        )
    raw = file.read_bytes(8, header_bytes)
    if not raw.startswith(b"{"):
        raise MalformedFile("header does not start with {", where=path, got=raw[:1])
    header = parse_object(raw, where=path)
    metadata = _parse_metadata(header.pop(METADATA_KEY, {}), path)
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


def _parse_metadata(metadata: object, path: str | Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedFile(f"{METADATA_KEY} does not map strings to strings", where=path)
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
