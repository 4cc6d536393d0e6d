"""The model description: what a Llama-family network is, apart from its weights.

One frozen dataclass, under the field names of Hugging Face, and the only place where a ``config.json``
or the metadata of a GGUF file is turned into one. Everything a runtime of ours cannot compute exactly
is refused here, by name, before a byte of weights is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.fields import Fields

__all__ = ["FAMILIES", "ROPE_STYLES", "ModelConfig", "RopeScaling"]

#: Families whose layer is the one of :mod:`irq_runtime.reference`.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

#: ``half``: element i is rotated with i + head_dim/2 (Hugging Face); ``interleaved``: with i + 1
#: (stock llama files, whose q and k rows are permuted to suit).
ROPE_STYLES = ("half", "interleaved")

#: Base of the rotary frequencies where a config.json names none.
_DEFAULT_THETA = 10000.0

#: Sliding window of mistral and qwen where a config.json has no such key (null means none).
_DEFAULT_WINDOW = 4096

#: Upper bounds of the integer fields; a larger value is a damaged file, not a model.
_LIMITS = {
    "hidden_size": 2**20,
    "num_hidden_layers": 512,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training.

    Attributes:
        kind: ``linear`` (all frequencies divided by ``factor``) or ``llama3`` (low frequencies divided,
            high ones kept, a smooth step between; Llama 3.1).
        factor: Divisor, at least 1 in practice.
        low_freq_factor: llama3 only: wavelengths above original / low_freq_factor are divided.
        high_freq_factor: llama3 only: wavelengths below original / high_freq_factor are kept.
        original_max_position_embeddings: llama3 only: context of pre-training, positions.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise UnsupportedModel(
                "this RoPE scaling is not supported",
                where="rope_scaling",
                expected="none | linear | llama3",
                got=self.kind,
                hint="Remove rope_scaling if the model is used within its original context",
            )
        if not 0 < self.factor < 1e6:
            raise MalformedFile(
                "absurd factor", where="rope_scaling", expected="0 < factor < 1e6", got=self.factor
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < 1e6:
            raise MalformedFile(
                "contradictory frequency factors",
                where="rope_scaling",
                expected="0 < low_freq_factor < high_freq_factor",
                got=f"{self.low_freq_factor}, {self.high_freq_factor}",
            )
        if not 0 < self.original_max_position_embeddings < 2**31:
            raise MalformedFile(
                "absurd original context",
                where="rope_scaling.original_max_position_embeddings",
                got=self.original_max_position_embeddings,
            )


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder.

    Attributes:
        family: One of :data:`FAMILIES`.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides ``num_attention_heads`` (GQA).
        head_dim: Width of one head, even; need not be hidden_size / heads.
        intermediate_size: Width of the SwiGLU layer.
        vocab_size: Rows of the embedding.
        max_position_embeddings: Positions the model was made for.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Stretching of the frequencies, or None.
        rope_style: One of :data:`ROPE_STYLES`.
        tie_word_embeddings: The output head is the embedding.
        qkv_bias: q, k and v have a bias (qwen2).
        qk_norm: q and k are RMS-normalised per head before the rotation (qwen3).

    Raises:
        MalformedFile: A field is out of range or contradicts another.
        UnsupportedModel: The family is not one of ours.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_style: str = "half"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise _unknown_family(self.family)
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise _out_of_range(name, value)
        if self.num_attention_heads % self.num_key_value_heads:
            raise MalformedFile(
                "key-value heads do not divide the query heads",
                where="num_key_value_heads",
                expected=f"a divisor of {self.num_attention_heads}",
                got=self.num_key_value_heads,
            )
        if self.head_dim % 2:
            raise MalformedFile(
                "the rotary dimension is odd", where="head_dim", expected="even", got=self.head_dim
            )
        if not 0 < self.rms_norm_eps < 1:
            raise MalformedFile(
                "out of range", where="rms_norm_eps", expected="0 to 1", got=self.rms_norm_eps
            )
        if not 1 < self.rope_theta < 1e12:
            raise MalformedFile("out of range", where="rope_theta", expected="1 to 1e12", got=self.rope_theta)
        if self.rope_style not in ROPE_STYLES:
            raise MalformedFile(
                "unknown RoPE style",
                where="rope_style",
                expected=" | ".join(ROPE_STYLES),
                got=self.rope_style,
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def architecture(self) -> str:
        """The stock GGUF architecture: the family, with mistral read as llama."""
        return "llama" if self.family == "mistral" else self.family

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> ModelConfig:
        """Read the contents of a Hugging Face ``config.json``.

        Args:
            config: The parsed JSON, in the style of transformers 4 (``rope_theta``,
                ``rope_scaling``) or 5 (``rope_parameters``).

        Raises:
            UnsupportedModel: Another family, activation, RoPE scaling, or an active sliding window.
            MalformedFile: A key is missing, of the wrong type, or contradicts another.
        """
        fields = Fields(config, "config.json")
        family = fields.string("model_type")
        if family not in FAMILIES:
            raise _unknown_family(family)
        _refuse_what_we_cannot_compute(fields, family)
        hidden_size = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        if not 0 < heads <= _LIMITS["num_attention_heads"]:
            raise _out_of_range("num_attention_heads", heads)
        may_omit = family == "llama" or "num_key_value_heads" in config  # null means: one a query head
        head_dim = fields.integer("head_dim", 128 if family == "qwen3" else hidden_size // heads)
        theta, scaling = _read_hf_rope(fields)
        return cls(
            family=family,
            hidden_size=hidden_size,
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", heads if may_omit else None),
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )


def _out_of_range(name: str, value: object) -> MalformedFile:
    return MalformedFile("out of range", where=name, expected=f"1 to {_LIMITS[name]}", got=value)


def _unknown_family(family: str) -> UnsupportedModel:
    return UnsupportedModel(
        "this model family is not supported",
        expected=" | ".join(FAMILIES),
        got=family,
        hint="Other families need a forward pass of their own",
    )


def _refuse_what_we_cannot_compute(fields: Fields, family: str) -> None:
    """Raise UnsupportedModel for switches of transformers that change the forward pass."""
    where = fields.where
    if (act := fields.string("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel(
            "this activation is not supported",
            where=f"{where}: hidden_act",
            expected="silu",
            got=act,
            hint="Only SwiGLU feed-forward layers can be exported",
        )
    for key in ("attention_bias", "mlp_bias"):
        if fields.has(key) and fields.boolean(key) and family != "qwen2":
            raise UnsupportedModel(
                "biases are supported on q, k and v of qwen2 only",
                where=f"{where}: {key}",
                got=True,
                hint="Set the key to false if the checkpoint holds no such biases",
            )
    window = fields.integer("sliding_window", 0 if "sliding_window" in fields.values else _DEFAULT_WINDOW)
    active = family == "mistral" or fields.boolean("use_sliding_window", False)
    if active and 0 < window < fields.integer("max_position_embeddings"):
        raise UnsupportedModel(
            "sliding-window attention is not supported",
            where=f"{where}: sliding_window",
            expected="null, or at least max_position_embeddings",
            got=window,
            hint="Set max_position_embeddings to the window if longer contexts are not needed",
        )
    rope = fields.values.get("rope_parameters") or {}
    rotated = Fields(rope if isinstance(rope, Mapping) else {}, where).number(
        "partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)
    )
    if rotated != 1.0:
        raise UnsupportedModel(
            "partial rotation is not supported",
            where=f"{where}: partial_rotary_factor",
            expected=1,
            got=rotated,
            hint="Only models that rotate whole heads can be exported",
        )


def _read_hf_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling from either style of ``config.json``."""
    new_style = fields.has("rope_parameters")
    key = "rope_parameters" if new_style else "rope_scaling"
    values = fields.values.get(key)
    if values is None:
        return fields.number("rope_theta", _DEFAULT_THETA), None
    if not isinstance(values, Mapping):
        raise MalformedFile("wrong type of value", where=f"{fields.where}: {key}", expected="an object")
    rope = Fields(values, f"{fields.where}: {key}")
    theta = rope.number("rope_theta", fields.number("rope_theta", _DEFAULT_THETA))
    if fields.has("rope_theta") and theta != fields.number("rope_theta"):
        raise MalformedFile(
            "two values of rope_theta",
            where=fields.where,
            expected=fields.number("rope_theta"),
            got=theta,
        )
    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind == "default":
        return theta, None
    return theta, _read_scaling(kind, rope, fields.integer("max_position_embeddings"))


def _read_scaling(kind: str, rope: Fields, context: int) -> RopeScaling:
    if kind != "llama3":
        return RopeScaling(kind, rope.number("factor", 1.0 if kind != "linear" else None))
    return RopeScaling(
        kind,
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings", context),
    )
