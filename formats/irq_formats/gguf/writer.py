"""Writing GGUF v3: plan all offsets first, then stream one tensor at a time.

Peak memory is one tensor. The same metadata and tensors give the same bytes. What is written meets
the rules of llama.cpp's C reader (contiguous, padded data; names under 64 bytes) and our reader's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from irq_formats.atomic import atomic_file
from irq_formats.errors import UsageError
from irq_formats.gguf import rules
from irq_formats.gguf.types import STR, GgmlType, GgufValue, ValueType

__all__ = ["Progress", "TensorSource", "encode_header", "file_bytes", "write_gguf", "write_gguf_into"]

Progress = Callable[[str, int, int], None]
"""Called after each tensor with (name, bytes done, bytes in all)."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written, loaded when its turn comes.

    Attributes:
        name: Unique, under 64 bytes.
        shape: Logical shape in numpy order (out, in).
        type: Type of the data.
        load: Returns the raw data: natural dtype and ``shape``; BF16 as uint16; block types as
            uint8 of shape ``type.raw_shape(shape)``.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    load: Callable[[], NDArray[np.generic]]


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, GgufValue],
    tensors: Sequence[TensorSource],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF v3 file atomically, metadata and tensors in the order given.

    Args:
        path: Final name.
        metadata: Typed values; must hold ``general.architecture``. ``general.alignment`` (U32)
            changes the alignment from its default of 32 bytes.
        tensors: What to write; each is loaded once, in order.
        overwrite: Replace an existing file.
        progress: Called after each tensor.

    Raises:
        UsageError: Metadata or a tensor break a rule of the format; nothing is written.
        OutputExists: ``path`` exists and ``overwrite`` is false.
        PreflightRefused: The disk ran full.
    """
    encode_header(metadata, tensors)  # raises before there is a file
    with atomic_file(path, overwrite=overwrite) as file:
        write_gguf_into(file, metadata, tensors, progress=progress)


def write_gguf_into(
    file: BinaryIO,
    metadata: Mapping[str, GgufValue],
    tensors: Sequence[TensorSource],
    *,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file into an open one, so that several can appear together; else as :func:`write_gguf`."""
    header = encode_header(metadata, tensors)
    alignment = _alignment(metadata)
    total = file_bytes(metadata, tensors)
    file.write(header)
    done = len(header)
    for tensor in tensors:
        done += _write_tensor(file, tensor, alignment)
        if progress is not None:
            progress(tensor.name, done, total)


def file_bytes(metadata: Mapping[str, GgufValue], tensors: Sequence[TensorSource]) -> int:
    """Return the bytes of the file :func:`write_gguf` would write (for plans and preflight).

    Raises:
        UsageError: As :func:`write_gguf`.
    """
    alignment = _alignment(metadata)
    sizes = [tensor.type.nbytes(tensor.shape) for tensor in tensors]
    data = sum(size + rules.padding(size, alignment) for size in sizes)
    return len(encode_header(metadata, tensors)) + data


def encode_header(metadata: Mapping[str, GgufValue], tensors: Sequence[TensorSource]) -> bytes:
    """Return everything before the tensor data, padding included.

    Raises:
        UsageError: Metadata or a tensor break a rule of the format.
    """
    _check_metadata(metadata)
    _check_tensors(tensors)
    alignment = _alignment(metadata)
    parts = [rules.MAGIC, struct.pack("<IQQ", rules.VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.type), _value(value)]
    offset = 0  # bytes from the start of the data section
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", tensor.type, offset))
        nbytes = tensor.type.nbytes(tensor.shape)
        offset += nbytes + rules.padding(nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(rules.padding(len(header), alignment))


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: GgufValue) -> bytes:
    """Encode a value without its type."""
    if value.type is not ValueType.ARRAY:
        if isinstance(value.value, str):
            return _string(value.value)
        return np.asarray(value.value, value.type.dtype).tobytes()
    element = value.element
    if element is None:
        raise UsageError("an array needs an element type")
    count = len(value.value)  # type: ignore[arg-type]
    head = struct.pack("<IQ", element, count)
    if isinstance(value.value, list):
        return head + b"".join(map(_string, value.value))
    return head + np.asarray(value.value, element.dtype).tobytes()


def _alignment(metadata: Mapping[str, GgufValue]) -> int:
    value = metadata.get(rules.ALIGNMENT_KEY)
    if value is None:
        return rules.DEFAULT_ALIGNMENT
    fault = rules.alignment_fault(value.value)
    if fault or value.type is not ValueType.U32:
        raise UsageError(fault or "alignment is not U32", where=rules.ALIGNMENT_KEY, got=value.value)
    return int(value.value)  # type: ignore[arg-type]


def _check_metadata(metadata: Mapping[str, GgufValue]) -> None:
    architecture = metadata.get(rules.ARCHITECTURE_KEY)
    if architecture is None or architecture.type is not STR or not architecture.value:
        raise UsageError("required key is missing", expected=f"{rules.ARCHITECTURE_KEY} (STR)")
    if len(metadata) > rules.MAX_KEYS:
        raise UsageError("too many keys", expected=f"≤ {rules.MAX_KEYS}", got=len(metadata))
    for key, value in metadata.items():
        fault = rules.key_fault(key) or _value_fault(value)
        if fault:
            raise UsageError(fault, where=key[:80])


def _value_fault(value: GgufValue) -> str | None:
    strings = value.value if isinstance(value.value, list) else [value.value]
    if isinstance(value.value, np.ndarray) and value.value.size > rules.MAX_ARRAY:
        return f"array is longer than {rules.MAX_ARRAY}"
    if len(strings) > rules.MAX_STRINGS:
        return f"array of strings is longer than {rules.MAX_STRINGS}"
    for text in strings:
        if isinstance(text, str):
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                return "string is not valid Unicode"
            if len(data) > rules.MAX_STRING_BYTES:
                return f"string is longer than {rules.MAX_STRING_BYTES} bytes"
    return None


def _check_tensors(tensors: Sequence[TensorSource]) -> None:
    if len(tensors) > rules.MAX_TENSORS:
        raise UsageError("too many tensors", expected=f"≤ {rules.MAX_TENSORS}", got=len(tensors))
    names: dict[str, str] = {}  # casefolded name: name
    for tensor in tensors:
        fault = rules.name_fault(tensor.name)
        if fault:
            raise UsageError(fault, where=tensor.name)
        if not 1 <= len(tensor.shape) <= rules.MAX_DIMS or min(tensor.shape) < 1:
            raise UsageError("wrong shape", where=tensor.name, expected="1 to 4 sizes ≥ 1", got=tensor.shape)
        tensor.type.raw_shape(tensor.shape)
        if tensor.name.casefold() in names:
            other = names[tensor.name.casefold()]
            raise UsageError("tensor names clash", where=tensor.name, got=other)
        names[tensor.name.casefold()] = tensor.name


def _write_tensor(file: BinaryIO, tensor: TensorSource, alignment: int) -> int:
    """Load, check and write one tensor and its padding; return the bytes written."""
    data = tensor.load()
    expected = tensor.type.dtype, tensor.type.raw_shape(tensor.shape)
    if (data.dtype.newbyteorder("<"), data.shape) != expected:
        raise UsageError(
            "loaded data do not match the declared tensor",
            where=tensor.name,
            expected=f"{expected[0]} {expected[1]}",
            got=f"{data.dtype} {data.shape}",
        )
    little = np.ascontiguousarray(data, dtype=expected[0])
    file.write(little.reshape(-1).view(np.uint8).data)
    pad = rules.padding(little.nbytes, alignment)
    file.write(bytes(pad))
    return little.nbytes + pad
