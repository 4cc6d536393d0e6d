"""Reading an ONNX export back: is what lies on the disk the checkpoint, bit for bit?

The files are opened as a stranger would, and compared with what is decoded from the checkpoint: codes put
back into the checkpoint's order, scales, offsets, plain tensors, adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from irq_export.export.onnx.adapters import NamedAdapter, read_adapter_file
from irq_formats.blocks import BlockTensor
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import ParityFailed
from irq_formats.onnx.codes import from_onnx
from irq_formats.onnx.model_file import OnnxModel, open_model

__all__ = ["ReadBack", "read_back"]

Array = NDArray[np.generic]

_ROWS = 4096


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

    def take(self, name: str) -> Array:
        """Read a tensor, which must be there."""
        self.unseen.discard(name)
        return self.model.read(name)

    def floats(self, name: str, expected: NDArray[np.float32]) -> None:
        """Compare the bits of a floating-point tensor with its source, rounded if it is narrower."""
        got = self.take(name)
        cast = expected.astype(got.dtype, copy=False)
        if got.dtype.kind != "f" or got.shape != cast.shape or got.tobytes() != cast.tobytes():
            raise ParityFailed("the written tensor differs from the checkpoint", where=name)
        if np.array_equal(cast.astype(np.float32, copy=False), expected):
            self.exact += 1
        else:
            self.rounded += 1

    def codes(self, name: str, tensor: BlockTensor, operator: str) -> None:
        """Compare codes, put back into the order of the checkpoint, row by row."""
        got, expected = self.take(name), tensor.parts["codes"].view(np.uint8)
        for start in range(0, expected.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            stored = got[rows].view(np.uint8)
            back = from_onnx(stored, tensor.spec.codebook, operator, tensor.spec.block_size)
            if not np.array_equal(back, expected[rows]):
                raise ParityFailed("the written codes differ from the checkpoint", where=name)
        self.exact += 1


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
        comparison.floats(name, checkpoint.plain_f32(name))
    for module, operator in operators.items():
        tensor = checkpoint.block_tensor(module)
        comparison.codes(f"{module}.codes", tensor, operator)
        comparison.floats(f"{module}.scale", tensor.scale())
        if tensor.spec.tau != "none" or f"{module}.tau" in model.tensors:
            comparison.floats(f"{module}.tau", tensor.tau())
    if baked is not None:
        for name, array in baked.parameters.items():
            comparison.floats(name, np.asarray(array, np.float32))
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
