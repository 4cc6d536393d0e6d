"""Attention, twice: onnxruntime's GroupQueryAttention, and plain ONNX operators.

Both rotate queries and keys by the cosines and sines of ``rope.cos`` and ``rope.sin``, computed in float32
as Hugging Face does, and keep keys and values in tensors ``(batch, kv heads, positions, head_dim)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from irq_formats.model import ModelConfig
from irq_formats.onnx.ops import CONTRIB, DTYPES, Ops, annotate
from irq_formats.rope import inverse_frequencies

__all__ = ["Attention", "Cache", "GqaAttention", "StandardAttention", "rope_tables"]


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, T ``(batch, kv heads, positions, head_dim)``."""

    key: ir.Value
    value: ir.Value


class Attention(Protocol):
    """What a layer needs: queries, keys and values in, their mixture and the new cache out."""

    def __call__(self, q: ir.Value, k: ir.Value, v: ir.Value, past: Cache) -> tuple[ir.Value, Cache]:
        """Append the nodes; q is T ``(batch, sequence, heads · head_dim)``, k and v likewise."""
        ...


def rope_tables(config: ModelConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines, float32 ``(positions, head_dim / 2)``, of angles rounded to float32."""
    angles = np.outer(np.arange(positions, dtype=np.float32), inverse_frequencies(config))
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


class GqaAttention:
    """com.microsoft::GroupQueryAttention, which rotates, keeps the cache and masks.

    ::

        attention_mask ── ReduceSum - 1 ── seqlens_k ──┐
                       └─ Shape[1] ─────── total ──────┤
        q, k, v, past key, past value ─────────────────┼── GroupQueryAttention ── y, present key, value
        cos, sin ──────────────────────────────────────┘

    Args:
        ops: Where to.
        config: The model.
        mask: int64 ``(batch, total positions)``, 1 where there is a token; those must come first.
        tables: Cosines and sines, T ``(positions, head_dim / 2)``.
        dtype: numpy name of T.
    """

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        mask: ir.Value,
        tables: tuple[ir.Value, ir.Value],
        *,
        dtype: str,
    ) -> None:
        self._ops, self._config, self._tables, self._dtype = ops, config, tables, dtype
        int32 = int(DTYPES["int32"])
        lengths = ops("ReduceSum", mask, ops.const([1]), keepdims=0)
        self._last = ops("Cast", ops("Sub", lengths, ops.const([1])), to=int32)  # (batch,)
        total = ops("Squeeze", ops("Shape", mask, start=1), ops.const([0]))
        self._total = ops("Cast", total, to=int32)

    def __call__(self, q: ir.Value, k: ir.Value, v: ir.Value, past: Cache) -> tuple[ir.Value, Cache]:
        """Append one node."""
        y, key, value = self._ops.many(
            "GroupQueryAttention",
            3,
            *(q, k, v, past.key, past.value, self._last, self._total, *self._tables),
            domain=CONTRIB,
            num_heads=self._config.num_attention_heads,
            kv_num_heads=self._config.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=1 / sqrt(self._config.head_dim),
        )
        width = self._config.num_attention_heads * self._config.head_dim
        annotate(y, self._dtype, ["batch_size", "sequence_length", width])
        return y, Cache(key, value)


class StandardAttention:
    """Attention in operators of ONNX alone; the mask may have zeros anywhere.

    Query heads that share a key head are stacked along the sequence, so that keys are not repeated::

        q (batch, kv, group · sequence, d) · kᵀ (batch, kv, d, total)

    Args:
        ops: Where to.
        config: The model.
        mask: int64 ``(batch, total positions)``.
        tables: Cosines and sines, T ``(positions, head_dim / 2)``.
        ids: int64 ``(batch, sequence)``, for its shape.
        dtype: numpy name of T.
    """

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        mask: ir.Value,
        tables: tuple[ir.Value, ir.Value],
        *,
        ids: ir.Value,
        dtype: str,
    ) -> None:
        self._ops, self._config = ops, config
        self._scale = ops.const(np.array(1 / sqrt(config.head_dim), dtype))
        length = ops("Shape", ids, start=1)  # (1,)
        counted = ops("Sub", ops("CumSum", mask, ops.const(np.array(1))), ops.const([1]))
        positions = ops("Max", counted, ops.const([0]))
        positions = ops("Slice", positions, ops("Neg", length), ops.const([2**31 - 1]), ops.const([1]))
        self._cos, self._sin = (
            ops("Unsqueeze", ops("Gather", table, positions, axis=0), ops.const([1])) for table in tables
        )  # (batch, 1, sequence, d / 2)
        total = ops("Shape", mask, start=1)
        columns = ops("Range", *(ops.const(np.array(0)), ops("Squeeze", total), ops.const(np.array(1))))
        rows = ops("Slice", columns, ops("Neg", length), ops.const([2**31 - 1]), ops.const([0]))
        causal = ops("LessOrEqual", columns, ops("Unsqueeze", rows, ops.const([1])))  # (sequence, total)
        present = ops("Cast", ops("Unsqueeze", mask, ops.const([1, 2])), to=int(ir.DataType.BOOL))
        seen = ops("And", causal, present)  # (batch, 1, sequence, total)
        low = np.array(np.finfo(dtype).min / 2, dtype)  # a score may be added, and the sum stays finite
        self._bias = ops("Where", seen, ops.const(np.array(0, dtype)), ops.const(low))

    def __call__(self, q: ir.Value, k: ir.Value, v: ir.Value, past: Cache) -> tuple[ir.Value, Cache]:
        """Append the nodes of one layer."""
        ops, config = self._ops, self._config
        heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        key = ops("Concat", past.key, self._rotate(self._split(k, kv)), axis=2)
        value = ops("Concat", past.value, self._split(v, kv), axis=2)
        scaled = ops("Mul", self._rotate(self._split(q, heads)), self._scale)  # float16 holds no q · k
        grouped = ops("Reshape", scaled, ops.const([0, kv, -1, d]))
        scores = ops("MatMul", grouped, ops("Transpose", key, perm=[0, 1, 3, 2]))
        stacked = ops("Shape", scores)
        by_head = ops("Concat", *self._by_head(q, key), axis=0)
        masked = ops("Add", ops("Reshape", scores, by_head), self._bias)
        weights = ops("Softmax", masked, axis=-1)
        mixed = ops("MatMul", ops("Reshape", weights, stacked), value)
        mixed = ops("Reshape", mixed, ops("Concat", *self._by_head(q, key)[:3], ops.const([d]), axis=0))
        mixed = ops("Transpose", mixed, perm=[0, 2, 1, 3])
        return ops("Reshape", mixed, ops.const([0, 0, heads * d])), Cache(key, value)

    def _by_head(self, q: ir.Value, key: ir.Value) -> tuple[ir.Value, ...]:
        """Return batch, heads, sequence, total: each int64 ``(1,)``."""
        ops = self._ops
        return (
            ops("Shape", q, start=0, end=1),
            ops.const([self._config.num_attention_heads]),
            ops("Shape", q, start=1, end=2),
            ops("Shape", key, start=2, end=3),
        )

    def _split(self, x: ir.Value, heads: int) -> ir.Value:
        """(batch, sequence, heads · d) to (batch, heads, sequence, d)."""
        ops = self._ops
        apart = ops("Reshape", x, ops.const([0, 0, heads, self._config.head_dim]))
        return ops("Transpose", apart, perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value) -> ir.Value:
        """Rotate element i of a head with i + d/2."""
        ops = self._ops
        first, second = ops.many("Split", 2, x, axis=-1, num_outputs=2)
        left = ops("Sub", ops("Mul", first, self._cos), ops("Mul", second, self._sin))
        right = ops("Add", ops("Mul", second, self._cos), ops("Mul", first, self._sin))
        return ops("Concat", left, right, axis=-1)
