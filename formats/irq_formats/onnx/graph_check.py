"""What a graph may contain (spec/irq-onnx.md): checked before a runtime sees the file.

Everything is refused that an export never has: other domains and versions, operators outside the few contrib
ones, subgraphs, functions that call functions, tensors outside the data file that are larger than they say,
external data anywhere but in the initialisers of the graph. Of every quantised matrix, attributes and tensors
must agree: kernels read as many bytes as the attributes say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import onnx

from irq_formats.codebooks import CODEBOOKS
from irq_formats.errors import IrqError, MalformedFile
from irq_formats.onnx.codes import codes_shape
from irq_formats.onnx.operators import DOMAIN, IR_VERSION, OPSETS, VERSION
from irq_formats.onnx.ops import CONTRIB

__all__ = ["StoredShape", "check_graph"]

_PRODUCTS = {"MatMulBnb4": "nf4", "MatMulNBits": "int4"}
_CONTRIB_OPS = {*_PRODUCTS, "GroupQueryAttention"}
_OPERATORS = {f"MatMulBlocks{codebook.upper()}": codebook for codebook in CODEBOOKS}
_VERSIONS = {**OPSETS, DOMAIN: VERSION}
#: Bits per element of what constants and default values may be.
_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.BOOL: 8,
}
_AttributeType = onnx.AttributeProto


class StoredShape(Protocol):
    """What is known of a tensor in the data file."""

    @property
    def dtype(self) -> str:
        """Its numpy name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def check_graph(proto: onnx.ModelProto, tensors: Mapping[str, StoredShape], *, where: Path) -> None:
    """Check a graph.

    Args:
        proto: The model.
        tensors: What lies in the data file, by name.
        where: Its file, for error messages.

    Raises:
        MalformedFile: It contains what no export contains.
    """
    _Checker(proto, tensors, where).check()


class _Checker:
    def __init__(self, proto: onnx.ModelProto, tensors: Mapping[str, StoredShape], where: Path) -> None:
        self._proto, self._tensors, self._where = proto, tensors, where
        #: Block size of each function of ours, as its nodes say; all must say the same.
        self._block_sizes: dict[str, int] = {}

    def check(self) -> None:
        graph = self._proto.graph
        if self._proto.ir_version != IR_VERSION:
            raise self._wrong("unknown version of ONNX IR", expected=IR_VERSION, got=self._proto.ir_version)
        imported = self._versions(self._proto.opset_import)
        if self._proto.training_info or graph.sparse_initializer:
            raise self._wrong("training information or sparse tensors")
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                self._inline(tensor)
        self._unique("initializers", (tensor.name for tensor in graph.initializer))
        self._unique("functions", (function.name for function in self._proto.functions))
        outputs = [name for node in graph.node for name in node.output]
        self._unique("values", (name for name in (*outputs, *self._tensors) if name))
        for node in graph.node:
            self._node(node, imported)
            if node.domain == DOMAIN:
                self._block_node(node)
            elif node.op_type in _PRODUCTS:
                self._stock_product(node)
        for function in self._proto.functions:
            self._function(function)

    def _versions(self, imports: Sequence[onnx.OperatorSetIdProto]) -> set[str]:
        """Check versions; return the domains that are imported."""
        for entry in imports:
            if _VERSIONS.get(entry.domain) != entry.version:
                expected = ", ".join(
                    f"{domain or 'ai.onnx'} {version}" for domain, version in _VERSIONS.items()
                )
                got = f"{entry.domain[:40] or 'ai.onnx'} {entry.version}"
                raise self._wrong("unknown domain or version", expected=expected, got=got)
        return {entry.domain for entry in imports}

    def _node(self, node: onnx.NodeProto, imported: set[str], *, in_function: bool = False) -> None:
        is_known = (
            node.domain == ""
            or (node.domain == CONTRIB and node.op_type in _CONTRIB_OPS)
            or (node.domain == DOMAIN and node.op_type in _OPERATORS and not in_function)
        )
        if not is_known or node.overload:
            raise self._wrong("unknown operator", got=f"{node.domain[:40]}::{node.op_type[:40]}")
        if node.domain not in imported:
            raise self._wrong("a domain that is not imported", got=f"{node.domain}: {node.op_type[:40]}")
        self._unique("attributes", (attribute.name for attribute in node.attribute))
        for attribute in node.attribute:
            if attribute.type in (_AttributeType.GRAPH, _AttributeType.GRAPHS) or attribute.HasField("g"):
                raise self._wrong("a node with a subgraph", got=node.op_type)
            if attribute.sparse_tensor.ByteSize() or attribute.sparse_tensors or attribute.tensors:
                raise self._wrong("an attribute of sparse or several tensors", got=node.op_type)
            if attribute.HasField("t"):
                self._inline(attribute.t)

    def _inline(self, tensor: onnx.TensorProto) -> None:
        """A tensor in the graph itself is as large as it says."""
        if tensor.data_location != onnx.TensorProto.DEFAULT or tensor.external_data:
            raise self._wrong("external data outside the initializers", got=tensor.name[:80])
        bits = _BITS.get(tensor.data_type)
        nbytes = prod(tensor.dims) * (bits or 0) // 8
        typed = any(
            len(getattr(tensor, f"{kind}_data")) for kind in ("float", "int32", "int64", "double", "string")
        )
        if bits is None or min(tensor.dims, default=1) < 0 or typed or len(tensor.raw_data) != nbytes:
            raise self._wrong(
                "a constant of another size than it says",
                expected=f"raw data of {list(tensor.dims)[:8]}",
                got=f"{len(tensor.raw_data)} bytes, data type {tensor.data_type}: {tensor.name[:80]}",
            )

    def _block_node(self, node: onnx.NodeProto) -> None:
        """A quantised matrix: operator, attributes and tensors say the same."""
        codebook = _OPERATORS[node.op_type]
        attributes = {a.name: a.s if a.name == "codebook" else a.i for a in node.attribute}
        if attributes.keys() != {"codebook", "block_size", "K", "N"}:
            raise self._wrong("attributes", got=f"{node.name[:80]}: {', '.join(sorted(attributes))[:80]}")
        if attributes["codebook"] != codebook.encode():
            raise self._wrong("codebook", expected=codebook, got=attributes["codebook"])
        self._matrix(node, codebook, attributes["block_size"], attributes["K"], attributes["N"])
        if not any(function.name == node.op_type for function in self._proto.functions):
            raise self._wrong("an operator without a function body", got=node.op_type)
        if self._block_sizes.setdefault(node.op_type, attributes["block_size"]) != attributes["block_size"]:
            raise self._wrong("one operator with two block sizes", got=node.op_type)

    def _stock_product(self, node: onnx.NodeProto) -> None:
        """A product of onnxruntime's own, in profile stock."""
        numbers = {a.name: a.i for a in node.attribute}
        missing = {"K", "N", "block_size"} - numbers.keys()
        if missing or numbers.get("bits", 4) != 4 or numbers.get("transB", 1) != 1:
            raise self._wrong("attributes", got=f"{node.name[:80]}: {numbers}")
        self._matrix(
            node, _PRODUCTS[node.op_type], numbers["block_size"], numbers["K"], numbers["N"], tau=False
        )

    def _matrix(
        self, node: onnx.NodeProto, codebook: str, block_size: int, k: int, n: int, *, tau: bool = True
    ) -> None:
        sizes = (32,) if codebook == "int8" else (64, 32)
        if block_size not in sizes or k < 1 or n < 1 or k % block_size:
            raise self._wrong("attributes", got=f"{node.name[:80]}: block_size {block_size}, K {k}, N {n}")
        if not 3 <= len(node.input) <= 3 + tau:
            raise self._wrong("inputs", got=f"{node.name[:80]}: {len(node.input)}")
        parts = zip(("codes", "scale", "tau"), node.input[1:], strict=False)
        for part, name in parts:
            expected = codes_shape(codebook, (n, k), block_size) if part == "codes" else (n, k // block_size)
            stored = self._tensors.get(name)
            is_float = stored is not None and stored.dtype.startswith("float")
            if stored is None or stored.shape != expected or is_float == (part == "codes"):
                raise self._wrong(
                    f"{part} of a matrix",
                    expected=f"{expected} in the data file",
                    got=f"{name[:80]}: {stored and (stored.dtype, stored.shape)}",
                )

    def _function(self, function: onnx.FunctionProto) -> None:
        """A body: of one of our operators, and its products are those of the node it stands for."""
        if function.domain != DOMAIN or function.name not in _OPERATORS or function.overload:
            raise self._wrong("unknown function", got=f"{function.domain[:40]}::{function.name[:40]}")
        imported = self._versions(function.opset_import)
        for node in function.node:
            self._node(node, imported, in_function=True)
            if node.op_type not in _PRODUCTS:
                continue
            own = {a.name: a.ref_attr_name or a.i for a in node.attribute}
            is_same = (
                _PRODUCTS[node.op_type] == _OPERATORS[function.name]
                and own.get("K") == "K"
                and own.get("N") == "N"
                and own.get("block_size") == self._block_sizes.get(function.name, own.get("block_size"))
                and own.get("bits", 4) == 4
                and own.get("transB", 1) == 1
                and list(node.input[:3]) == list(function.input[:3])
            )
            if not is_same:
                raise self._wrong("a body that reads another matrix", got=function.name)

    def _unique(self, what: str, names: Iterable[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self._wrong(f"two {what} of one name", got=name[:80])
            seen.add(name)

    def _wrong(self, what: str, *, expected: object = None, got: object = None) -> IrqError:
        return MalformedFile(what, where=self._where, expected=expected, got=got)
