"""Reading an ONNX export back: is what lies on the disk the checkpoint, bit for bit?

The files are opened as a stranger would, and compared with what is decoded from the checkpoint: codes put
back into the checkpoint's order, scales, offsets, plain tensors, adapters. What no checkpoint has, the graph
and its tables of cosines, is built once more.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from irq_export.export.onnx.adapters import NamedAdapter, read_adapter_file
from irq_export.export.onnx.network import Network
from irq_export.export.onnx.weights import float_chunks
from irq_formats.blocks import BlockTensor
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import MalformedFile, ParityFailed
from irq_formats.onnx.codes import codes_shape, from_onnx
from irq_formats.onnx.model_file import OnnxModel, StoredTensor

__all__ = ["ReadBack", "compare_graph", "read_back"]

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

    def table(self, name: str, expected: NDArray[Any]) -> None:
        """Compare numbers that were computed: another machine's cosine may round the other way."""
        self._take(name, expected.shape)
        got: NDArray[Any] = self.model.read(name)
        if got.dtype != expected.dtype or not (np.abs(got - expected) <= np.spacing(np.abs(expected))).all():
            raise ParityFailed("the written table differs from the model's", where=name)

    def _take(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Find a tensor, which must be there and of this shape."""
        self.unseen.discard(name)
        stored = self.model.tensor(name)
        if stored.shape != shape:
            raise ParityFailed("the shape of a written tensor", where=name, expected=shape, got=stored.shape)
        return stored


def compare_graph(model: OnnxModel, network: Network) -> None:
    """Compare a graph with the one that is built today: all that is not a tensor of the data file.

    Args:
        model: What was written.
        network: What is built from the checkpoint, with the same options.

    Raises:
        ParityFailed: They differ, or onnx refuses the graph.
    """
    expected = network.proto
    if model.proto != expected:
        difference = _difference(model.proto, expected, "model")
        raise ParityFailed("the graph is not the one that to-onnx builds", where=model.path, got=difference)
    try:
        onnx.checker.check_model(str(model.path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityFailed("onnx refuses the graph", where=model.path, got=error) from error


def read_back(
    model: OnnxModel,
    checkpoint: Checkpoint,
    network: Network,
    adapters: Sequence[NamedAdapter],
    baked: NamedAdapter | None,
) -> ReadBack:
    """Compare the written tensors with the checkpoint.

    Args:
        model: What was written.
        checkpoint: The source.
        network: What is built from it: the operators of its modules, and the tables of cosines.
        adapters: What the adapter files must hold.
        baked: What the model must hold, if an adapter was put into it.

    Raises:
        ParityFailed: Anything differs.
        MalformedFile: A file breaks spec/irq-onnx.md.
    """
    comparison = _Comparison(model)
    for name in checkpoint.plain:
        shape = tuple(checkpoint.plain[name].shape)
        comparison.floats(name, shape, float_chunks(checkpoint, name))
    for module, operator in network.operators.items():
        tensor = checkpoint.block_tensor(module)
        comparison.codes(f"{module}.codes", tensor, operator.codebook)
        scale = tensor.scale()
        comparison.floats(f"{module}.scale", scale.shape, [scale])
        if tensor.spec.tau != "none" or f"{module}.tau" in model.tensors:
            comparison.floats(f"{module}.tau", scale.shape, [tensor.tau()])
    if baked is not None:
        for name, array in baked.parameters.items():
            comparison.floats(name, array.shape, [np.asarray(array, np.float32)])
    for name in ("rope.cos", "rope.sin"):
        [table] = network.tensors[name].data.chunks()
        comparison.table(name, table)
    for adapter in adapters:
        _same_adapter(model.path.parent / adapter.file_name, adapter)
        comparison.exact += len(adapter.parameters)
    if left := sorted(comparison.unseen)[:5]:
        raise ParityFailed("tensors that the checkpoint does not have", where=model.path, got=left)
    return ReadBack(comparison.exact, comparison.rounded)


def _same_adapter(path: Path, adapter: NamedAdapter) -> None:
    written, expected = read_adapter_file(path), adapter.parameters
    same = written.keys() == expected.keys() and all(
        written[name].dtype == array.dtype and np.array_equal(written[name], array)
        for name, array in expected.items()
    )
    if not same:
        raise ParityFailed("the written adapter differs from its source", where=path)


def _difference(found: Any, expected: Any, path: str) -> str:
    """Return where two values of protobuf, which are not equal, first differ, and how."""
    if isinstance(expected, MutableSequence):
        pairs = enumerate(zip_longest(found, expected))
        index, (a, b) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
        name = getattr(a if b is None else b, "name", "")
        return _difference(a, b, f"{path}[{index}]{f' ({name})' if name else ''}")
    if found is None or expected is None:
        return f"{path}: one {'too few' if found is None else 'too many'}"
    for field in expected.DESCRIPTOR.fields if hasattr(expected, "DESCRIPTOR") else ():
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if a != b:
            return _difference(a, b, f"{path}.{field.name}")
    return f"{path}: {str(found).strip()!r:.40} instead of {str(expected).strip()!r:.40}"
