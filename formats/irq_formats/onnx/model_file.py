"""Reading an exported model back: the graph, and its tensors where they lie.

Nothing of the data file is read before all that the graph says about it has been checked: its name is plain
and it is no link, every range lies inside it and belongs to one tensor, lengths are those of dtype and shape.
Of it is read then only what lies between tensors, which must be the zero bytes that align them.
A model that opens may be given to a runtime: the graph has been checked too (:mod:`.graph_check`).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.fields import Fields
from irq_formats.files import FixedFile, open_fixed
from irq_formats.onnx.data_file import next_offset
from irq_formats.onnx.graph_check import check_graph
from irq_formats.onnx.operators import DOMAIN
from irq_formats.onnx.wire import check_wire

__all__ = ["DATA_NAME", "FORMAT_VERSION", "MODEL_NAME", "OnnxModel", "StoredTensor", "open_model"]

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
#: Version of the layout, metadata ``irq.version``.
FORMAT_VERSION = "1"

#: A graph of 126 layers takes 2.4 MB, in profile stock up to 8.0 MB (8.4 MB may be).
_MAX_GRAPH_BYTES = 8 << 20
#: What the metadata must hold beside version and hash.
_METADATA: dict[str, str] = {
    "irq.profile": "irq|stock",
    "irq.attention": "gqa|standard",
}
_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.UINT8: "uint8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the data file.

    Attributes:
        dtype: numpy name.
        shape: Its shape.
        offset: First byte.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class OnnxModel:
    """An opened model.

    Attributes:
        path: ``model.onnx``.
        proto: The graph.
        metadata: ``metadata_props`` of the model.
        tensors: What lies in the data file, by name.
        data: The data file; None if the graph has no external data.
    """

    path: Path
    proto: onnx.ModelProto
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    data: FixedFile | None

    def read(self, name: str) -> NDArray[np.generic]:
        """Read a tensor of the data file.

        Raises:
            MalformedFile: There is no such tensor, or the file changed since it was opened.
        """
        tensor = self.tensor(name)
        return self.read_part(name, 0, prod(tensor.shape)).reshape(tensor.shape)

    def read_part(self, name: str, start: int, count: int) -> NDArray[np.generic]:
        """Read ``count`` elements of a tensor from its element ``start``, in the order of the file.

        Raises:
            MalformedFile: As :meth:`read`, or the tensor has fewer elements.
        """
        tensor = self.tensor(name)
        if self.data is None or min(start, count) < 0 or start + count > prod(tensor.shape):
            raise MalformedFile("the tensor is shorter", where=f"{self.path}: {name}", got=tensor.shape)
        offset = tensor.offset + start * np.dtype(tensor.dtype).itemsize
        return self.data.read_array(offset, tensor.dtype, (count,))

    def tensor(self, name: str) -> StoredTensor:
        """Return where a tensor is.

        Raises:
            MalformedFile: There is no such tensor.
        """
        if name not in self.tensors:
            raise MalformedFile("no such tensor", where=self.path, expected=name)
        return self.tensors[name]


def open_model(path: str | Path) -> OnnxModel:
    """Open ``model.onnx`` and check where its tensors are.

    Args:
        path: The file, or the directory it is in.

    Raises:
        UsageError: There is no such file.
        MalformedFile: It is no ONNX model, or it breaks spec/irq-onnx.md, section 4.
        UnsupportedModel: It is not of a version this library knows.
    """
    path = Path(path)
    path = path / MODEL_NAME if path.is_dir() else path
    file = _open_unlinked(path, "the model")
    if file.size > _MAX_GRAPH_BYTES:
        raise MalformedFile("too large", where=path, expected=f"<= {_MAX_GRAPH_BYTES} bytes", got=file.size)
    graph = file.read_bytes(0, file.size)
    check_wire(graph, onnx.ModelProto, where=path)
    try:
        proto = onnx.load_model_from_string(graph)
    except Exception as error:  # protobuf's own, which differs between its versions
        raise MalformedFile("is not an ONNX model", where=path, got=str(error)[:80]) from error
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if (version := metadata.get("irq.version")) != FORMAT_VERSION:
        raise UnsupportedModel(
            "not an ONNX model of irq-export, or of a later version",
            where=path,
            expected=f"irq.version {FORMAT_VERSION}",
            got=version,
        )
    _check_metadata(path, proto, metadata)
    data = _data_file(path, _external(proto)) if any(_external(proto)) else None
    tensors: dict[str, StoredTensor] = {}
    for proto_tensor in _external(proto):
        if proto_tensor.name in tensors:
            raise MalformedFile("two tensors of one name", where=path, got=proto_tensor.name)
        tensors[proto_tensor.name] = _stored(path, proto_tensor, data.size if data else 0)
    if data is not None:
        _check_layout(path, tensors, data)
    check_graph(proto, tensors, where=path)
    return OnnxModel(path, proto, metadata, tensors, data)


def _check_metadata(path: Path, proto: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    if len(metadata) != len(proto.metadata_props):
        raise MalformedFile("metadata of one key twice", where=path)
    for key, pattern in _METADATA.items():
        value = metadata.get(key, "")
        if re.fullmatch(pattern, value) is None:
            raise MalformedFile("metadata", where=f"{path}: {key}", expected=pattern, got=repr(value[:80]))
    Fields(metadata, str(path)).digest("irq.base_hash")
    ours = (entry.domain == DOMAIN for entry in (*proto.functions, *proto.graph.node))
    if metadata["irq.profile"] == "stock" and any(ours):
        raise MalformedFile("operators of ours in profile stock", where=path)


def _external(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of the data file; a list of them would hold a Python object for each."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _data_file(path: Path, external: Iterable[onnx.TensorProto]) -> FixedFile:
    """Open the one file that all tensors name, if its name keeps inside the directory."""
    names = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    if len(names) != 1:
        raise MalformedFile(
            "external data in several files", where=path, expected="one", got=sorted(names)[:3]
        )
    name = names.pop()
    if name in ("", ".", "..") or any(bad in name for bad in "/\\\0:"):
        raise MalformedFile(
            "external data outside the model's folder", where=path, expected="a plain name", got=repr(name)
        )
    target = path.parent / name
    try:
        return _open_unlinked(target, "external data")
    except UsageError as error:
        raise MalformedFile("external data is missing", where=target) from error


def _open_unlinked(path: Path, what: str) -> FixedFile:
    """Open a file that is no link and has no second name."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError) as error:
        raise UsageError("cannot be opened", where=path, got=error) from error
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
        raise MalformedFile(f"{what} is a link", where=path, expected="a file of one name")
    file = open_fixed(path)
    if file.identity[:2] != (status.st_dev, status.st_ino):
        raise MalformedFile(f"{what} was replaced while it was opened", where=path)
    return file


def _stored(path: Path, tensor: onnx.TensorProto, size: int) -> StoredTensor:
    where = f"{path}: {tensor.name}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or not {"location", "offset", "length"} <= entries.keys():
        raise MalformedFile("external data", where=where, expected="location, offset, length, each once")
    if tensor.data_type not in _DTYPES or any(dim < 0 for dim in tensor.dims):
        raise MalformedFile("dtype or shape", where=where, got=(tensor.data_type, list(tensor.dims)[:8]))
    numbers = [entries["offset"], entries["length"]]
    if not all(number.isascii() and number.isdecimal() and len(number) < 20 for number in numbers):
        raise MalformedFile("offset or length is no number", where=where, got=[n[:24] for n in numbers])
    offset, length = map(int, numbers)
    stored = StoredTensor(_DTYPES[tensor.data_type], tuple(tensor.dims), offset)
    if length != stored.nbytes or offset + length > size:
        raise MalformedFile(
            "external data does not fit",
            where=where,
            expected=f"{stored.nbytes} bytes inside {size}",
            got=f"{length} bytes at {offset}",
        )
    return stored


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], data: FixedFile) -> None:
    """Tensors lie one behind the other, aligned, with zero bytes between them and nothing behind the last."""
    end, previous, gaps = 0, "", []
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise MalformedFile("tensors overlap", where=path, got=f"{previous}, {name}")
        if tensor.offset != (expected := next_offset(end, tensor.nbytes)):
            raise MalformedFile(
                "a tensor where none begins", where=f"{path}: {name}", expected=expected, got=tensor.offset
            )
        if tensor.offset > end:
            gaps.append((end, tensor.offset))
        end, previous = tensor.offset + tensor.nbytes, name
    if end != data.size:
        raise MalformedFile("bytes follow the last tensor", where=data.path, expected=end, got=data.size)
    if not data.is_zero(gaps):
        raise MalformedFile("bytes between tensors that are not zero", where=data.path)
