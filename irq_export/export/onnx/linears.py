"""Linear layers: one node of domain ``irq`` (or its body), a bias, and the side branch of an adapter.

::

    x ──┬── MatMulBlocks<KIND> ── Add bias ── Add ── y        (…, N)
        │                                      │
        └── MatMul M.lora_A ── MatMul M.lora_B ┘              (…, r)
            (K, r)             (r, N)

The side branch is float32 in every model: adapters are swapped as they were trained, and onnxruntime 1.23 to
1.28 crashes on inputs of float16 that have a default (it takes them for constants). In a float16 model a
``Cast`` stands before it and one behind.

A layer that is not quantised is a ``MatMul`` with the matrix on the left, where onnxruntime uses it as it
lies in the file: on the right it would keep a transposed and packed copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from irq_export.export.onnx.weights import WeightTable
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UnsupportedModel
from irq_formats.onnx.codes import carrier
from irq_formats.onnx.operators import DOMAIN, Operator, body
from irq_formats.onnx.ops import DTYPES, Ops, annotate

__all__ = ["LinearWriter", "LoraPair", "choose_operators"]


@dataclass(frozen=True)
class LoraPair:
    """The side branch of a linear layer, as it lies in memory.

    Attributes:
        a: A' transposed, float32 ``(K, r)``.
        b: scaling · B' transposed, float32 ``(r, N)``.
        origins: Adapter tensors it is made of.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    origins: tuple[str, ...]


def choose_operators(
    checkpoint: Checkpoint, *, dtype: str, carry: bool, as_functions: bool
) -> dict[str, Operator]:
    """Return the operator of every quantised module.

    Args:
        checkpoint: The source.
        dtype: Of activations.
        carry: Whether int3 and int2 go into 4-bit integers.
        as_functions: Whether all matrices of a codebook share one body, so need one block size and all
            or no offsets.

    Raises:
        UnsupportedModel: They share a body and have two block sizes.
    """
    chosen = {
        module: Operator(
            carrier(block.spec.codebook, carry=carry),
            block.spec.block_size,
            block.spec.tau != "none",
            dtype,
        )
        for module, block in checkpoint.blocks.items()
    }
    if not as_functions:
        return chosen
    for codebook in {operator.codebook for operator in chosen.values()}:
        same = {operator for operator in chosen.values() if operator.codebook == codebook}
        sizes = {operator.block_size for operator in same}
        if len(sizes) > 1:
            raise UnsupportedModel(
                f"{codebook} matrices of two block sizes",
                where=checkpoint.path,
                got=sorted(sizes),
                hint="Use --profile stock, or quantise with one block size",
            )
        shared = Operator(codebook, sizes.pop(), any(operator.has_tau for operator in same), dtype)
        chosen |= {module: shared for module, operator in chosen.items() if operator.codebook == codebook}
    return chosen


class LinearWriter:
    """Writes linear layers.

    Args:
        ops: Where to.
        weights: Where the tensors come from.
        operators: Of the quantised modules.
        as_functions: Nodes of domain ``irq`` rather than their bodies.
        slots: Whether layers get inputs for an adapter.
        baked: Side branches to be put into the model, by module.
    """

    def __init__(
        self,
        ops: Ops,
        weights: WeightTable,
        operators: Mapping[str, Operator],
        *,
        as_functions: bool,
        slots: bool,
        baked: Mapping[str, LoraPair],
    ) -> None:
        self.ops = ops
        self.weights = weights
        self.operators = operators
        self.as_functions = as_functions
        self.slots = slots
        self.baked = baked
        self.slot_values: list[ir.Value] = []

    def __call__(self, module: str, x: ir.Value, *, matrix: str | None = None) -> ir.Value:
        """Append a linear layer.

        Args:
            module: Its Hugging Face name.
            x: T ``(batch, sequence, K)``.
            matrix: The module whose matrix it uses, if not its own (a tied head).

        Returns:
            T ``(batch, sequence, N)``.
        """
        ops, source = self.ops, matrix or module
        if source in self.operators:
            y = self._block_product(module, source, x)
        else:
            weight = self.weights.plain(f"{source}.weight")
            columns = ops("Transpose", x, perm=[0, 2, 1])
            y = ops("Transpose", ops("MatMul", weight, columns), perm=[0, 2, 1])
        if f"{module}.bias" in self.weights.checkpoint.plain:
            y = ops("Add", y, self.weights.plain(f"{module}.bias"))
        pair = self._lora(module)
        if pair is None:
            return y
        dtype = self.weights.dtype
        side = ops("MatMul", ops("MatMul", ops.cast(x, dtype, "float32"), pair[0]), pair[1])
        return ops("Add", y, ops.cast(side, "float32", dtype))

    def _block_product(self, module: str, source: str, x: ir.Value) -> ir.Value:
        operator = self.operators[source]
        values = self.weights.block(source, operator)
        n, k = self.weights.checkpoint.blocks[source].shape
        if not self.as_functions:
            y = body(operator, self.ops, x, values.codes, values.scale, values.tau, n=n, k=k)
            return annotate(y, operator.dtype, ["batch_size", "sequence_length", n])
        inputs = [x, values.codes, values.scale, *([] if values.tau is None else [values.tau])]
        y = self.ops(
            operator.op_type,
            *inputs,
            domain=DOMAIN,
            name=module,
            codebook=operator.codebook,
            block_size=operator.block_size,
            K=k,
            N=n,
        )
        codebook = self.weights.checkpoint.blocks[source].spec.codebook
        if codebook != operator.codebook:
            self.ops.nodes[-1].metadata_props["irq.codebook"] = codebook
        return annotate(y, operator.dtype, ["batch_size", "sequence_length", n])

    def _lora(self, module: str) -> tuple[ir.Value, ir.Value] | None:
        """Return the float32 pair of a layer: baked, an input of rank 0 by default, or none."""
        names = f"{module}.lora_A", f"{module}.lora_B"
        if module in self.baked:
            pair = self.baked[module]
            a = self.weights.computed(names[0], pair.a, origins=pair.origins[:1])
            return a, self.weights.computed(names[1], pair.b, origins=pair.origins[1:])
        if not self.slots or module == "lm_head":
            return None
        n, k = self._shape(module)
        rank = f"{module}.rank"
        a = self._slot(names[0], [k, rank], np.zeros((k, 0), np.float32))
        return a, self._slot(names[1], [rank, n], np.zeros((0, n), np.float32))

    def _slot(self, name: str, shape: list[int | str], default: NDArray[np.float32]) -> ir.Value:
        """Return a graph input with a default."""
        kind = ir.TensorType(DTYPES["float32"])
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
        value.const_value = ir.Tensor(default, name=name)
        self.slot_values.append(value)
        return value

    def _shape(self, module: str) -> tuple[int, int]:
        checkpoint = self.weights.checkpoint
        if module in checkpoint.blocks:
            return checkpoint.blocks[module].shape
        n, k = checkpoint.plain[f"{module}.weight"].shape
        return n, k
