"""The graph of a Llama-family decoder, from the shapes of a checkpoint.

::

    input_ids ── embedding ─┬──────────────── + ─┬─────────── + ── … ── norm ── head ── logits
                            └ norm ─ attention ──┘└ norm ─ mlp ┘

Inputs and outputs carry onnxruntime-genai's names: ``input_ids``, ``attention_mask``,
``past_key_values.N.key|value`` in, ``logits``, ``present.N.key|value`` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir

from irq_export.export.onnx.attention import Attention, Cache, GqaAttention, StandardAttention, rope_tables
from irq_export.export.onnx.linears import LinearWriter, LoraPair, choose_operators
from irq_export.export.onnx.options import DTYPES as OPTION_DTYPES
from irq_export.export.onnx.options import OnnxOptions
from irq_export.export.onnx.weights import ExportTensor, WeightTable
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.model import ModelConfig
from irq_formats.onnx.data_file import data_offsets
from irq_formats.onnx.model_file import DATA_NAME, FORMAT_VERSION
from irq_formats.onnx.operators import DOMAIN, IR_VERSION, OPSETS, VERSION, Operator, function
from irq_formats.onnx.ops import DTYPES, Ops

__all__ = ["Network", "build_network"]

_EMBEDDING, _HEAD, _NORM = "model.embed_tokens", "lm_head", "model.norm"


@dataclass(frozen=True)
class Network:
    """A graph without its weights.

    Attributes:
        inputs: Graph inputs, adapter slots last.
        outputs: Graph outputs.
        nodes: In order.
        initializers: Values whose contents lie in the data file.
        tensors: Those contents, by name, in the order of the file.
        slots: Adapter inputs with their defaults.
        operators: Of every quantised module.
        metadata: ``metadata_props`` of the model.
    """

    inputs: Sequence[ir.Value]
    outputs: Sequence[ir.Value]
    nodes: Sequence[ir.Node]
    initializers: Sequence[ir.Value]
    tensors: Mapping[str, ExportTensor]
    slots: Sequence[ir.Value]
    operators: Mapping[str, Operator]
    metadata: Mapping[str, str]

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model, its tensors pointing into the data file."""
        offsets, _ = data_offsets(tensor.data for tensor in self.tensors.values())
        for value in self.initializers:
            data = self.tensors[str(value.name)].data
            value.const_value = ir.ExternalTensor(
                DATA_NAME,
                offsets[data.name],
                data.nbytes,
                DTYPES[data.dtype],
                shape=ir.Shape(data.shape),
                name=data.name,
            )
        used = self._used_operators()
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=[*self.initializers, *self.slots],
            opset_imports={**OPSETS, **({DOMAIN: VERSION} if used else {})},
            name="irq",
        )
        model = ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="irq-export",
            functions=[function(operator) for operator in used],
            metadata_props=dict(self.metadata),
        )
        return ir.to_proto(model)

    def _used_operators(self) -> list[Operator]:
        """Return those that nodes of domain ``irq`` call."""
        used = {node.op_type for node in self.nodes if node.domain == DOMAIN}
        by_type = {operator.op_type: operator for operator in self.operators.values()}
        return [by_type[op_type] for op_type in sorted(used)]


def build_network(
    checkpoint: Checkpoint, options: OnnxOptions, *, baked: Mapping[str, LoraPair] | None = None
) -> Network:
    """Build the graph of a checkpoint.

    Args:
        checkpoint: The source; only its shapes are looked at.
        options: What to build.
        baked: Side branches to be put into the model, by module.

    Raises:
        UnsupportedModel: A matrix has no place in this graph.
        UsageError: The context is longer than the model's.
    """
    longest = checkpoint.model.max_position_embeddings
    if options.context is not None and options.context > longest:
        raise UsageError(
            "context out of range",
            expected=f"at most {longest}, for which the model was made",
            got=options.context,
        )
    return _Builder(checkpoint, options, baked or {}).build()


class _Builder:
    """One call of :func:`build_network`."""

    def __init__(self, checkpoint: Checkpoint, options: OnnxOptions, baked: Mapping[str, LoraPair]) -> None:
        self.config: ModelConfig = checkpoint.model
        self.options = options
        self.metadata = {
            "irq.version": FORMAT_VERSION,
            "irq.profile": options.profile,
            "irq.attention": options.attention,
            "irq.base_hash": checkpoint.base_hash,
        }
        self.dtype = OPTION_DTYPES[options.dtype]
        self.ops = Ops()
        self.weights = WeightTable(checkpoint, self.dtype)
        self.as_functions = options.profile == "irq"
        self.operators = choose_operators(
            checkpoint, dtype=self.dtype, carry=options.int_bits == "4", as_functions=self.as_functions
        )
        self.linear = LinearWriter(
            self.ops,
            self.weights,
            self.operators,
            as_functions=self.as_functions,
            slots=options.adapter_slots and not options.bake_adapter,
            baked=baked,
        )

    def build(self) -> Network:
        """Write the nodes down."""
        ids = self._value("input_ids", "int64", ["batch_size", "sequence_length"])
        mask = self._value("attention_mask", "int64", ["batch_size", "total_sequence_length"])
        past = [self._cache(f"past_key_values.{i}", "past") for i in range(self.config.num_hidden_layers)]
        attention = self._attention(ids, mask)
        x = self._embed(ids)
        present = []
        for index, cache in enumerate(past):
            x, updated = self._layer(f"model.layers.{index}", x, attention, cache)
            present.append(updated)
        self.ops.scope(_HEAD)
        tied = _EMBEDDING if self.config.tie_word_embeddings else None
        logits = self.linear(_HEAD, self._norm(_NORM, x), matrix=tied)
        outputs = [self._named(logits, "logits", ["batch_size", "sequence_length", self.config.vocab_size])]
        for index, cache in enumerate(present):
            shape = self._cache_shape("total")
            outputs.append(self._named(cache.key, f"present.{index}.key", shape))
            outputs.append(self._named(cache.value, f"present.{index}.value", shape))
        inputs = [ids, mask, *(value for cache in past for value in (cache.key, cache.value))]
        return Network(
            inputs=[*inputs, *self.linear.slot_values],
            outputs=outputs,
            nodes=self.ops.nodes,
            initializers=self.weights.values,
            tensors=self.weights.tensors,
            slots=self.linear.slot_values,
            operators=self.operators,
            metadata=self.metadata,
        )

    def _attention(self, ids: ir.Value, mask: ir.Value) -> Attention:
        self.ops.scope("attention")
        positions = self.options.context or self.config.max_position_embeddings
        cos, sin = (table.astype(self.dtype) for table in rope_tables(self.config, positions))
        tables = self.weights.computed("rope.cos", cos), self.weights.computed("rope.sin", sin)
        if self.options.attention == "gqa":
            return GqaAttention(self.ops, self.config, mask, tables, dtype=self.dtype)
        return StandardAttention(self.ops, self.config, mask, tables, ids=ids, dtype=self.dtype)

    def _embed(self, ids: ir.Value) -> ir.Value:
        """Rows of the embedding, T ``(batch, sequence, hidden)``; of int8 codes only these are decoded."""
        ops = self.ops
        ops.scope(_EMBEDDING)
        operator = self.operators.get(_EMBEDDING)
        if operator is None:
            return ops("Gather", self.weights.plain(f"{_EMBEDDING}.weight"), ids, axis=0)
        if operator.codebook != "int8":
            raise UnsupportedModel(
                "the embedding must be int8 or floating point",
                where=self.weights.checkpoint.path,
                got=operator.codebook,
            )
        values = self.weights.block(_EMBEDDING, operator)
        codes = ops("Cast", ops("Gather", values.codes, ids, axis=0), to=int(DTYPES["float32"]))
        signed = ops("Sub", codes, ops.const(np.array(128, np.float32)))  # (batch, sequence, nb, 32)
        scale = ops.cast(ops("Gather", values.scale, ids, axis=0), self.dtype, "float32")
        rows = ops("Mul", signed, ops("Unsqueeze", scale, ops.const([3])))
        return ops.cast(ops("Reshape", rows, ops.const([0, 0, -1])), "float32", self.dtype)

    def _layer(self, name: str, x: ir.Value, attention: Attention, past: Cache) -> tuple[ir.Value, Cache]:
        """One decoder layer."""
        ops = self.ops
        ops.scope(f"{name}.self_attn")
        normed = self._norm(f"{name}.input_layernorm", x)
        q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", normed) for part in "qkv")
        if self.config.qk_norm:
            q, k = (
                self._head_norm(f"{name}.self_attn.{part}_norm", value, heads)
                for part, value, heads in (
                    ("q", q, self.config.num_attention_heads),
                    ("k", k, self.config.num_key_value_heads),
                )
            )
        mixed, present = attention(q, k, v, past)
        x = ops("Add", x, self.linear(f"{name}.self_attn.o_proj", mixed))
        ops.scope(f"{name}.mlp")
        normed = self._norm(f"{name}.post_attention_layernorm", x)
        gate = self.linear(f"{name}.mlp.gate_proj", normed)
        gate = ops("Mul", gate, ops("Sigmoid", gate))
        inner = ops("Mul", gate, self.linear(f"{name}.mlp.up_proj", normed))
        return ops("Add", x, self.linear(f"{name}.mlp.down_proj", inner)), present

    def _norm(self, module: str, x: ir.Value) -> ir.Value:
        """RMSNorm over the last axis, in float32: the pattern that onnxruntime fuses."""
        ops = self.ops
        wide = ops.cast(x, self.dtype, "float32")
        square = ops("Pow", wide, ops.const(np.array(2, np.float32)))
        mean = ops("ReduceMean", square, ops.const([-1]), keepdims=1)
        root = ops("Sqrt", ops("Add", mean, ops.const(np.array(self.config.rms_norm_eps, np.float32))))
        normed = ops("Mul", ops("Div", wide, root), self.weights.plain(f"{module}.weight", dtype="float32"))
        return ops.cast(normed, "float32", self.dtype)

    def _head_norm(self, module: str, x: ir.Value, heads: int) -> ir.Value:
        """RMSNorm of every head by itself."""
        ops, d = self.ops, self.config.head_dim
        apart = ops("Reshape", x, ops.const([0, 0, heads, d]))
        return ops("Reshape", self._norm(module, apart), ops.const([0, 0, heads * d]))

    def _cache(self, name: str, when: str) -> Cache:
        shape = self._cache_shape(when)
        key, value = (self._value(f"{name}.{part}", self.dtype, shape) for part in ("key", "value"))
        return Cache(key, value)

    def _cache_shape(self, when: str) -> list[int | str]:
        kv, d = self.config.num_key_value_heads, self.config.head_dim
        return ["batch_size", kv, f"{when}_sequence_length", d]

    def _value(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(DTYPES[dtype]))

    def _named(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(DTYPES[self.dtype])
        return value
