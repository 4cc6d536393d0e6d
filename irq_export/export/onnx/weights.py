"""The tensors of a checkpoint as initialisers: named, shaped and traced to their origin, not yet read.

A graph is built from shapes alone. What a :class:`WeightTable` hands out are values without contents, and
for each a :class:`~irq_formats.onnx.data_file.DataTensor` that reads and converts its bytes, a few megabytes
at a time, when the data file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from irq_formats.blocks import BlockTensor, part_layout
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UnsupportedModel
from irq_formats.onnx.codes import codes_shape, to_onnx
from irq_formats.onnx.data_file import DataTensor
from irq_formats.onnx.operators import Operator
from irq_formats.onnx.ops import DTYPES

__all__ = ["BlockValues", "ExportTensor", "WeightTable", "float_chunks"]

Array = NDArray[np.generic]

_CHUNK_BYTES = 16 << 20
_WORK_BYTES = 6 * _CHUNK_BYTES  # temporaries of a chunk: unpacked codes, both nibbles, the result


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of the output.

    Attributes:
        data: Name, dtype, shape and reader.
        origins: Checkpoint and adapter tensors it uses up.
        work_bytes: Memory needed while it is written, in bytes.
        is_block: Whether it is part of a block-quantised matrix, for bits per weight.
    """

    data: DataTensor
    origins: tuple[str, ...]
    work_bytes: int
    is_block: bool = False


@dataclass(frozen=True)
class BlockValues:
    """The inputs of an operator that make up its matrix."""

    codes: ir.Value
    scale: ir.Value
    tau: ir.Value | None


class WeightTable:
    """Initialisers by name; each tensor of the checkpoint becomes at most one.

    Args:
        checkpoint: Where the tensors are.
        dtype: ``float32`` or ``float16``: of everything that is not a code, a norm or an adapter.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.tensors: dict[str, ExportTensor] = {}
        self._values: dict[str, ir.Value] = {}
        self._block = lru_cache(maxsize=1)(checkpoint.block_tensor)  # its parts are asked for in a row

    @property
    def values(self) -> list[ir.Value]:
        """All initialisers, in the order of the data file."""
        return list(self._values.values())

    def plain(self, name: str, *, dtype: str | None = None) -> ir.Value:
        """Return a tensor that is not quantised, widened or rounded to ``dtype``."""
        ref = self.checkpoint.plain[name]
        dtype = dtype or self.dtype
        read = partial(_floats, self.checkpoint, name, dtype)
        work = ref.nbytes + _WORK_BYTES
        return self._add(name, dtype, tuple(ref.shape), read, (name,), work)

    def computed(self, name: str, array: Array, *, origins: tuple[str, ...] = ()) -> ir.Value:
        """Return an initialiser whose contents are known already."""
        return self._add(name, array.dtype.name, array.shape, lambda: [array], origins, array.nbytes)

    def block(self, module: str, operator: Operator) -> BlockValues:
        """Return the parts of a block-quantised matrix, as an operator wants them.

        Args:
            module: Hugging Face name of the module.
            operator: Whose codes are of the module's codebook or carry it; with ``has_tau``, a matrix
                without offsets gets zeros.
        """
        entry = self.checkpoint.blocks[module]
        n, k = entry.shape
        blocks = (n, k // entry.spec.block_size)
        parts = part_layout(entry.spec, entry.shape)
        work = sum(prod(shape) * dtype.itemsize for dtype, shape in parts.values()) + _WORK_BYTES

        def origins(part: str) -> tuple[str, ...]:
            return tuple(f"{module}.{name}" for name in parts if name.startswith(part))

        def add(
            part: str, dtype: str, shape: tuple[int, ...], chunks: Callable[[], Iterable[Array]]
        ) -> ir.Value:
            return self._add(f"{module}.{part}", dtype, shape, chunks, origins(part), work, is_block=True)

        tau = None
        codes = add(
            "codes",
            "uint8",
            codes_shape(operator.codebook, entry.shape, operator.block_size),
            lambda: _codes(self._block(module), operator.codebook),
        )
        scale = add("scale", self.dtype, blocks, lambda: [self._cast(self._block(module).scale(), module)])
        if operator.has_tau:
            tau = add("tau", self.dtype, blocks, lambda: [self._cast(self._block(module).tau(), module)])
        return BlockValues(codes, scale, tau)

    def _add(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        chunks: Callable[[], Iterable[Array]],
        origins: tuple[str, ...],
        work_bytes: int,
        *,
        is_block: bool = False,
    ) -> ir.Value:
        if name not in self._values:
            data = DataTensor(name, dtype, shape, chunks)
            self.tensors[name] = ExportTensor(data, origins, work_bytes, is_block)
            self._values[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(DTYPES[dtype]))
        return self._values[name]

    def _cast(self, values: NDArray[np.float32], where: str) -> Array:
        return _rounded(values, self.dtype, where)


def _codes(tensor: BlockTensor, operator: str) -> Iterator[Array]:
    """Yield the codes of a matrix in the order of an operator."""
    packed = tensor.parts["codes"].view(np.uint8)
    rows = max(1, _CHUNK_BYTES // tensor.shape[1])
    for start in range(0, packed.shape[0], rows):
        yield to_onnx(packed[start : start + rows], tensor.spec.codebook, operator, tensor.spec.block_size)


def float_chunks(checkpoint: Checkpoint, name: str) -> Iterator[NDArray[np.float32]]:
    """Yield the elements of a tensor that is not quantised as float32, exactly, a few megabytes at a time."""
    raw = checkpoint.plain_raw(name).reshape(-1)
    is_bf16 = checkpoint.plain[name].dtype == "BF16"
    step = _CHUNK_BYTES // 4
    for start in range(0, raw.size, step):
        chunk = raw[start : start + step]
        if is_bf16:  # the upper half of a float32
            yield (chunk.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            yield chunk.astype(np.float32, copy=False)


def _floats(checkpoint: Checkpoint, name: str, dtype: str) -> Iterator[Array]:
    """Yield the elements in another dtype."""
    for chunk in float_chunks(checkpoint, name):
        yield _rounded(chunk, dtype, name)


def _rounded(values: NDArray[np.float32], dtype: str, where: str) -> Array:
    """Return values in ``dtype``; refuse what float16 cannot hold."""
    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
        raise UnsupportedModel(
            f"a value exceeds {dtype}",
            where=where,
            got=float(np.abs(values).max()),
            hint="Export with --dtype f32",
        )
    return rounded
