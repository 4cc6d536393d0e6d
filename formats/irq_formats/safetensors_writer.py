"""Writing safetensors in streams: declare every tensor, then write each exactly once."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from irq_formats.atomic import atomic_file
from irq_formats.errors import UsageError
from irq_formats.safetensors_types import (
    DTYPES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    TensorRef,
    TensorSpec,
)

__all__ = ["SafeTensorsWriter", "write_safetensors"]

_ALIGN_BYTES = 8
_OPAQUE = {"BF16", "F8_E4M3", "F8_E5M2"}  # held in integers, so numpy's dtype does not name them
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in _OPAQUE}


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
        if len(raw) > MAX_HEADER_BYTES:
            raise UsageError("header too large", expected=f"≤ {MAX_HEADER_BYTES}", got=len(raw))
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


def _layout(specs: Sequence[TensorSpec]) -> list[TensorRef]:
    """Place tensors by falling item size; offsets are relative to the data."""
    names = set()
    for spec in specs:
        if spec.name in names or spec.name == METADATA_KEY:
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
    header: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    for ref in layout:
        header[ref.name] = {
            "dtype": ref.dtype,
            "shape": list(ref.shape),
            "data_offsets": [ref.offset, ref.offset + ref.nbytes],
        }
    return header
