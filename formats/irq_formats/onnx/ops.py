"""Writing nodes down: one call a node, values in, value out. Names are labels, never plumbing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["CONTRIB", "DTYPES", "Attribute", "Ops", "annotate"]

#: Domain of onnxruntime's own operators.
CONTRIB = "com.microsoft"

#: numpy dtype by name to ONNX's.
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "uint8": ir.DataType.UINT8,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
}

Attribute = int | float | str | Sequence[int] | ir.Attr | NDArray[np.generic]


class Ops:
    """A list of nodes that grows: ``ops("Add", a, b)`` appends a node and returns its output."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._prefix = ""

    def scope(self, prefix: str) -> None:
        """Name the nodes that follow ``/prefix/OpType_number``."""
        self._prefix = f"/{prefix}" if prefix else ""

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Append a node with one output."""
        return self.many(op_type, 1, *inputs, domain=domain, name=name, **attributes)[0]

    def many(
        self,
        op_type: str,
        outputs: int,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str = "",
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs."""
        name = name or f"{self._prefix}/{op_type}_{len(self.nodes)}"
        attrs = [_attr(key, value) for key, value in attributes.items()]
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}" if outputs > 1 else f"{name}:out"
        self.nodes.append(node)
        return node.outputs

    def cast(self, x: ir.Value, source: str, target: str) -> ir.Value:
        """Return x, which has numpy dtype ``source``, in dtype ``target``; no node if they are one."""
        return x if source == target else self("Cast", x, to=int(DTYPES[target]))

    def const(self, value: NDArray[np.generic] | Sequence[int], dtype: str = "int64") -> ir.Value:
        """Return a constant, the same one for the same contents.

        Args:
            value: An array, or integers for an array of ``dtype``.
            dtype: numpy dtype of integers that are no array.
        """
        array = value if isinstance(value, np.ndarray) else np.array(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            self._constants[key] = self("Constant", name=name, value=array)
        return self._constants[key]


def annotate(value: ir.Value, dtype: str, shape: Sequence[int | str] | None = None) -> ir.Value:
    """Say what the output of an operator outside the standard is: ONNX cannot infer it.

    Args:
        value: The output.
        dtype: numpy name.
        shape: Numbers and symbols; None leaves the rank open.
    """
    value.type = ir.TensorType(DTYPES[dtype])
    value.shape = None if shape is None else ir.Shape(shape)
    return value


def _attr(name: str, value: Attribute) -> ir.Attr:
    if isinstance(value, ir.Attr):
        return value
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(name, ir.Tensor(value))
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    return ir.AttrInt64s(name, list(value))
