"""The data file beside a model: one tensor after the other, streamed (spec/irq-onnx.md, section 4).

Large tensors begin on a page of memory, so that a runtime can map them; gaps are zero bytes. Offsets are
known before the first byte is written, so the graph can be written without a single weight in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import IrqError

__all__ = ["DataTensor", "data_offsets", "next_offset", "write_data"]

_PAGE_BYTES = 4096
_SMALL_ALIGNMENT = 64
#: From here on a tensor begins on a page of its own.
_LARGE_BYTES = 64 << 10

#: Called with (bytes done, bytes in all, name of the tensor written).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DataTensor:
    """A tensor to be written.

    Attributes:
        name: Its name in the graph.
        dtype: ``float32``, ``float16`` or ``uint8``.
        shape: Its shape.
        chunks: Yields its elements in order, in arrays of any shape; called once, when it is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[NDArray[np.generic]]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def next_offset(end: int, nbytes: int) -> int:
    """Return where a tensor of ``nbytes`` begins, behind one that ends at ``end``."""
    alignment = _PAGE_BYTES if nbytes >= _LARGE_BYTES else _SMALL_ALIGNMENT
    return -(-end // alignment) * alignment


def data_offsets(tensors: Iterable[DataTensor]) -> tuple[dict[str, int], int]:
    """Return where each tensor begins, and the bytes of the whole file."""
    offsets, end = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = next_offset(end, tensor.nbytes)
        end = offsets[tensor.name] + tensor.nbytes
    return offsets, end


def write_data(
    file: BinaryIO,
    tensors: Iterable[DataTensor],
    offsets: Mapping[str, int],
    *,
    progress: Progress | None = None,
    total: int = 0,
) -> None:
    """Write all tensors, in order, each in the chunks that it yields.

    Args:
        file: An empty binary file.
        tensors: In the order of their offsets.
        offsets: As :func:`data_offsets` returns them.
        progress: Called after each tensor.
        total: Bytes in all, for ``progress``.

    Raises:
        IrqError: A tensor yields other bytes than it announced; a bug of the exporter.
    """
    position = 0
    for tensor in tensors:
        file.write(bytes(offsets[tensor.name] - position))
        written = 0
        for chunk in tensor.chunks():
            if chunk.dtype.name != tensor.dtype:
                raise IrqError(
                    "a tensor of another dtype", where=tensor.name, expected=tensor.dtype, got=chunk.dtype
                )
            written += file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        if written != tensor.nbytes:
            raise IrqError("a tensor of another size", where=tensor.name, expected=tensor.nbytes, got=written)
        position = offsets[tensor.name] + written
        if progress is not None:
            progress(position, total, tensor.name)
