"""Reading an ONNX export back: is what lies on the disk the checkpoint, bit for bit?

The files are opened as a stranger would, and compared with what is decoded from the checkpoint: codes put
back into the checkpoint's order, scales, offsets, plain tensors, adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from irq_export.export.onnx.adapters import NamedAdapter, read_adapter_file
from irq_export.export.onnx.weights import float_chunks
from irq_formats.blocks import BlockTensor
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import MalformedFile, ParityFailed
from irq_formats.onnx.codes import codes_shape, from_onnx
from irq_formats.onnx.model_file import OnnxModel, StoredTensor, open_model

__all__ = ["ReadBack", "read_back"]

_ROWS = 1024


@dataclass(frozen=True)
class ReadBack:
    """What was compared.

    Attributes:
        exact: Tensors found bit for bit what the checkpoint holds.
        rounded: Tensors found to be the checkpoint's, rounded once to float16.
    """

    exact: int
    rounded: int


class _Comparison:
    """Collects what was compared; the first difference raises."""

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.exact = self.rounded = 0
        self.unseen = set(model.tensors)

    def floats(self, name: str, shape: tuple[int, ...], expected: Iterable[NDArray[np.float32]]) -> None:
        """Compare the bits of a floating-point tensor with its source, rounded if it is narrower."""
        stored = self._take(name, shape)
        position, is_exact = 0, True
        for chunk in expected:
            got = self.model.read_part(name, position, chunk.size)
            cast = chunk.reshape(-1).astype(got.dtype, copy=False)
            if stored.dtype == "uint8" or not np.array_equal(got.view(np.uint8), cast.view(np.uint8)):
                raise ParityFailed("the written tensor differs from the checkpoint", where=name)
            is_exact &= np.array_equal(cast.astype(np.float32, copy=False), chunk.reshape(-1))
            position += chunk.size
        self.exact += is_exact
        self.rounded += not is_exact

    def codes(self, name: str, tensor: BlockTensor, operator: str) -> None:
        """Compare codes, put back into the order of the checkpoint, some rows at a time."""
        self._take(name, codes_shape(operator, tensor.shape, tensor.spec.block_size))
        expected = tensor.parts["codes"].view(np.uint8)
        width = prod(codes_shape(operator, (1, tensor.shape[1]), tensor.spec.block_size))
        for start in range(0, expected.shape[0], _ROWS):
            rows = expected[start : start + _ROWS]
            stored = self.model.read_part(name, start * width, len(rows) * width).view(np.uint8)
            try:
                back = from_onnx(
                    stored.reshape(len(rows), width), tensor.spec.codebook, operator, tensor.spec.block_size
                )
            except MalformedFile as error:
                raise ParityFailed("the written codes differ from the checkpoint", where=name) from error
            if not np.array_equal(back, rows):
                raise ParityFailed("the written codes differ from the checkpoint", where=name)
        self.exact += 1

    def _take(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Find a tensor, which must be there and of this shape."""
        self.unseen.discard(name)
        stored = self.model.tensor(name)
        if stored.shape != shape:
            raise ParityFailed("the shape of a written tensor", where=name, expected=shape, got=stored.shape)
        return stored


def read_back(
    directory: Path,
    checkpoint: Checkpoint,
    operators: dict[str, str],
    adapters: Sequence[NamedAdapter],
    baked: NamedAdapter | None,
) -> ReadBack:
    """Compare the written files with the checkpoint.

    Args:
        directory: What was written.
        checkpoint: The source.
        operators: Codebook of the operator of every quantised module.
        adapters: What the adapter files must hold.
        baked: What the model must hold, if an adapter was put into it.

    Raises:
        ParityFailed: Anything differs.
        MalformedFile: A file breaks spec/irq-onnx.md.
    """
    model = open_model(directory)
    onnx.checker.check_model(str(model.path), full_check=True)
    comparison = _Comparison(model)
    for name in checkpoint.plain:
        shape = tuple(checkpoint.plain[name].shape)
        comparison.floats(name, shape, float_chunks(checkpoint, name))
    for module, operator in operators.items():
        tensor = checkpoint.block_tensor(module)
        comparison.codes(f"{module}.codes", tensor, operator)
        scale = tensor.scale()
        comparison.floats(f"{module}.scale", scale.shape, [scale])
        if tensor.spec.tau != "none" or f"{module}.tau" in model.tensors:
            comparison.floats(f"{module}.tau", scale.shape, [tensor.tau()])
    if baked is not None:
        for name, array in baked.parameters.items():
            comparison.floats(name, array.shape, [np.asarray(array, np.float32)])
    for adapter in adapters:
        _same_adapter(directory / adapter.file_name, adapter)
        comparison.exact += len(adapter.parameters)
    if left := comparison.unseen - {"rope.cos", "rope.sin"}:
        raise ParityFailed(
            "tensors that the checkpoint does not have", where=model.path, got=sorted(left)[:5]
        )
    return ReadBack(comparison.exact, comparison.rounded)


def _same_adapter(path: Path, adapter: NamedAdapter) -> None:
    written, expected = read_adapter_file(path), adapter.parameters
    same = written.keys() == expected.keys() and all(
        written[name].dtype == array.dtype and np.array_equal(written[name], array)
        for name, array in expected.items()
    )
    if not same:
        raise ParityFailed("the written adapter differs from its source", where=path)
