"""The model description as GGUF metadata, both ways.

The irq profile stores every field of :class:`ModelConfig` under its own name, exactly (float64), so
that reading gives an equal object::

    irq.model.family                 string   llama | mistral | qwen2 | qwen3
    irq.model.hidden_size ...        u32      the integer fields
    irq.model.rms_norm_eps           f64
    irq.model.rope_theta             f64
    irq.model.rope_style             string   half | interleaved
    irq.model.tie_word_embeddings    bool     and qkv_bias, qk_norm
    irq.model.rope_scaling.kind      string   absent where there is no scaling
    irq.model.rope_scaling.factor    f64      and low_freq_factor, high_freq_factor
    irq.model.rope_scaling.original_max_position_embeddings   u32

Stock profiles use llama.cpp's keys (``llama.block_count`` ...), in which ties, biases and norms are
told by the tensors that are there, llama3 scaling by ``rope_freqs.weight``, and the RoPE style by the
architecture: interleaved for llama, half for qwen2 and qwen3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.fields import Fields
from irq_formats.gguf.types import BOOL, F32, F64, STR, U32, GgufValue
from irq_formats.model import ModelConfig, RopeScaling

__all__ = ["IRQ_PREFIX", "STOCK_ARCHITECTURES", "model_metadata", "read_model"]

#: Prefix of the keys of the irq profile.
IRQ_PREFIX = "irq.model"
#: Stock architectures, and whether their files rotate interleaved pairs.
STOCK_ARCHITECTURES = {"llama": "interleaved", "qwen2": "half", "qwen3": "half"}

_TYPES = {"str": STR, "int": U32, "float": F64, "bool": BOOL}


def model_metadata(config: ModelConfig, prefix: str) -> dict[str, GgufValue]:
    """Return the keys that describe a model.

    Args:
        config: The model.
        prefix: :data:`IRQ_PREFIX`, or ``config.architecture`` for a stock file. A stock llama file must
            hold q and k rows permuted to interleaved pairs, whatever ``config.rope_style`` says.
    """
    if prefix == IRQ_PREFIX:
        return _irq_metadata(config, prefix)
    return _stock_metadata(config, prefix)


def read_model(metadata: Mapping[str, object], prefix: str, tensors: Collection[str] = ()) -> ModelConfig:
    """Read the model description of a file.

    Args:
        metadata: Values by key, as the reader returns them.
        prefix: :data:`IRQ_PREFIX` or the file's ``general.architecture``.
        tensors: Names of the file's tensors; decides ties, biases and norms of stock files.

    Raises:
        MalformedFile: A key is missing, of the wrong type, out of range, or contradicts another.
        UnsupportedModel: Another architecture, or a feature no runtime of ours computes.
    """
    fields = Fields(metadata, "metadata")
    config = _read_irq(fields) if prefix == IRQ_PREFIX else _read_stock(fields, prefix, tensors)
    listed = metadata.get("tokenizer.ggml.tokens")
    if listed is not None and len(fields.strings("tokenizer.ggml.tokens")) != config.vocab_size:
        raise MalformedFile(
            "vocabulary and token list differ",
            where="tokenizer.ggml.tokens",
            expected=config.vocab_size,
            got=len(fields.strings("tokenizer.ggml.tokens")),
        )
    return config


def _irq_metadata(config: ModelConfig | RopeScaling, prefix: str) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for field in dataclass_fields(config):
        value = getattr(config, field.name)
        if isinstance(value, RopeScaling):
            metadata |= _irq_metadata(value, f"{prefix}.{field.name}")
        elif value is not None:
            metadata[f"{prefix}.{field.name}"] = _TYPES[str(field.type)](value)
    return metadata


def _read_irq(fields: Fields) -> ModelConfig:
    scaling = None
    if fields.has(f"{IRQ_PREFIX}.rope_scaling.kind"):
        scaling = RopeScaling(**_read_dataclass(fields, RopeScaling, f"{IRQ_PREFIX}.rope_scaling"))
    values = _read_dataclass(fields, ModelConfig, IRQ_PREFIX)
    return ModelConfig(**values, rope_scaling=scaling)


def _read_dataclass(
    fields: Fields, kind: type[ModelConfig] | type[RopeScaling], prefix: str
) -> dict[str, Any]:
    getters: dict[str, Callable[[str], Any]] = {
        "str": fields.string,
        "int": fields.integer,
        "float": fields.number,
        "bool": fields.boolean,
    }
    return {
        field.name: getters[str(field.type)](f"{prefix}.{field.name}")
        for field in dataclass_fields(kind)
        if str(field.type) in getters
    }


def _stock_metadata(config: ModelConfig, prefix: str) -> dict[str, GgufValue]:
    keys = {
        "context_length": U32(config.max_position_embeddings),
        "embedding_length": U32(config.hidden_size),
        "block_count": U32(config.num_hidden_layers),
        "feed_forward_length": U32(config.intermediate_size),
        "attention.head_count": U32(config.num_attention_heads),
        "attention.head_count_kv": U32(config.num_key_value_heads),
        "attention.key_length": U32(config.head_dim),
        "attention.value_length": U32(config.head_dim),
        "attention.layer_norm_rms_epsilon": F32(config.rms_norm_eps),
        "rope.dimension_count": U32(config.head_dim),
        "rope.freq_base": F32(config.rope_theta),
        "vocab_size": U32(config.vocab_size),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        keys["rope.scaling.type"] = STR("linear")
        keys["rope.scaling.factor"] = F32(config.rope_scaling.factor)
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def _read_stock(fields: Fields, arch: str, tensors: Collection[str]) -> ModelConfig:
    if arch not in STOCK_ARCHITECTURES:
        raise UnsupportedModel(
            "this architecture is not supported",
            where="general.architecture",
            expected=" | ".join(STOCK_ARCHITECTURES),
            got=arch,
        )
    if fields.integer(f"{arch}.expert_count", 0):
        raise UnsupportedModel("mixtures of experts are not supported", where=f"{arch}.expert_count")
    hidden = fields.integer(f"{arch}.embedding_length")
    heads = fields.integer(f"{arch}.attention.head_count")
    if not 0 < heads <= hidden:
        raise MalformedFile(
            "out of range",
            where=f"{arch}.attention.head_count",
            expected=f"1 to {hidden}",
            got=heads,
        )
    head_dim = fields.integer(f"{arch}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (got := fields.integer(f"{arch}.{key}", head_dim)) != head_dim:
            raise MalformedFile(
                "contradicts the width of a head", where=f"{arch}.{key}", expected=head_dim, got=got
            )
    return ModelConfig(
        family=arch,
        hidden_size=hidden,
        num_hidden_layers=fields.integer(f"{arch}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
        vocab_size=_stock_vocab_size(fields, arch),
        max_position_embeddings=fields.integer(f"{arch}.context_length"),
        rms_norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=_stock_scaling(fields, arch),
        rope_style=STOCK_ARCHITECTURES[arch],
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )


def _stock_vocab_size(fields: Fields, arch: str) -> int:
    if fields.has(f"{arch}.vocab_size"):
        return fields.integer(f"{arch}.vocab_size")
    return len(fields.strings("tokenizer.ggml.tokens"))


def _stock_scaling(fields: Fields, arch: str) -> RopeScaling | None:
    """Read the keys as llama.cpp does: the old name where the new one is absent, and 0 means 1."""
    if (attn_factor := fields.number(f"{arch}.rope.scaling.attn_factor", 1.0)) != 1.0:
        raise UnsupportedModel(
            "rotary embeddings that also scale are not supported",
            where=f"{arch}.rope.scaling.attn_factor",
            expected=1,
            got=attn_factor,
        )
    kind = fields.string(f"{arch}.rope.scaling.type", "linear")
    factor = fields.number(f"{arch}.rope.scaling.factor", fields.number(f"{arch}.rope.scale_linear", 0.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind != "linear":
        raise UnsupportedModel(
            "this RoPE scaling is not supported",
            where=f"{arch}.rope.scaling.type",
            expected="none | linear, or llama3 through rope_freqs.weight",
            got=kind,
        )
    return RopeScaling("linear", factor)
