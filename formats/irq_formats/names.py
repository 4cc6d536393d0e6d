"""Tensor names: Hugging Face's and GGUF's, both ways, and the shape each tensor must have.

The Llama family has one naming table. Names may carry a suffix (``.weight``, ``.bias``) or none (a
module): the suffix is kept.
"""

from __future__ import annotations

import re

from irq_formats.errors import UnsupportedModel
from irq_formats.model import ModelConfig

__all__ = ["gguf_to_hf", "hf_to_gguf", "linear_names", "tensor_shapes"]

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LINEARS = tuple(name for name in _LAYER if name.endswith("_proj"))

_TOP_BACK = {gguf: hf for hf, gguf in _TOP.items()}
_LAYER_BACK = {gguf: hf for hf, gguf in _LAYER.items()}
_SUFFIX = r"(?P<suffix>\.weight|\.bias)?"
_HF_LAYER = re.compile(rf"model\.layers\.(?P<layer>0|[1-9]\d*)\.(?P<part>.+?){_SUFFIX}")
_GGUF_LAYER = re.compile(rf"blk\.(?P<layer>0|[1-9]\d*)\.(?P<part>.+?){_SUFFIX}")
_TOP_NAME = re.compile(rf"(?P<part>.+?){_SUFFIX}")


def _translate(
    name: str, layer: re.Pattern[str], prefix: str, parts: dict[str, str], top: dict[str, str]
) -> str:
    match = layer.fullmatch(name)
    if match and match["part"] in parts:
        return f"{prefix}.{match['layer']}.{parts[match['part']]}{match['suffix'] or ''}"
    match = _TOP_NAME.fullmatch(name)
    if match and match["part"] in top:
        return top[match["part"]] + (match["suffix"] or "")
    raise UnsupportedModel(
        "this tensor has no place in a Llama-family model",
        where=name,
        expected=f"{', '.join(top)}, or a layer's {', '.join(parts)}",
    )


def hf_to_gguf(name: str) -> str:
    """Translate a Hugging Face name: ``model.layers.3.mlp.up_proj.weight`` to ``blk.3.ffn_up.weight``.

    Raises:
        UnsupportedModel: The family has no such tensor.
    """
    return _translate(name, _HF_LAYER, "blk", _LAYER, _TOP)


def gguf_to_hf(name: str) -> str:
    """Translate a GGUF name: ``blk.3.ffn_up.weight`` to ``model.layers.3.mlp.up_proj.weight``.

    Raises:
        UnsupportedModel: The family has no such tensor.
    """
    return _translate(name, _GGUF_LAYER, "model.layers", _LAYER_BACK, _TOP_BACK)


def linear_names(config: ModelConfig) -> list[str]:
    """Return the Hugging Face module names of the linear layers of all decoder layers, in order.

    The embedding and the head are not among them.
    """
    return [f"model.layers.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in _LINEARS]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor a model consists of, by stock GGUF name, in file order, with its shape.

    Shapes are numpy's: matrices ``(out, in)``, the embedding ``(vocab_size, hidden_size)``.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_width, hidden),
        "attn_k.weight": (kv_width, hidden),
        "attn_v.weight": (kv_width, hidden),
        "attn_output.weight": (hidden, q_width),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    if config.qkv_bias:
        layer |= {"attn_q.bias": (q_width,), "attn_k.bias": (kv_width,), "attn_v.bias": (kv_width,)}
    if config.qk_norm:
        layer |= {f"attn_{x}_norm.weight": (config.head_dim,) for x in "qk"}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    return shapes
