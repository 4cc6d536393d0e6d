"""GGUF files whose container is right but whose keys describe no model (level: model)."""

from __future__ import annotations

from dataclasses import replace

from scripts.malformed import Case
from scripts.raw_gguf import (
    ARCHITECTURE,
    ARRAY,
    F32,
    GOOD,
    I32,
    STR,
    U32,
    Fields,
    array,
    f32,
    pair,
    string,
    u32,
)

NUMBERS = {
    "context_length": 64,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 16,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 4,
    "vocab_size": 2,
}
EPS = "attention.layer_norm_rms_epsilon"
TOKENS = "tokenizer.ggml.tokens"


def keys() -> dict[str, Fields]:
    """Return the key-value pairs of a model that is described without fault."""
    found = {key: pair(f"llama.{key}".encode(), U32, u32(n)) for key, n in NUMBERS.items()}
    found[EPS] = pair(f"llama.{EPS}".encode(), F32, f32(1e-5))
    found[TOKENS] = pair(TOKENS.encode(), ARRAY, array(STR, 2, string(b"x") + string(b"y")))
    return found


def encode(pairs: dict[str, Fields]) -> bytes:
    return replace(GOOD, pairs=(ARCHITECTURE, *pairs.values())).encode()


def cases() -> list[Case]:
    """Return every case of the model level."""

    def case(name: str, rule: str, message: str, pairs: dict[str, Fields]) -> Case:
        return Case(name, rule, message, {f"{name}.gguf": encode(pairs)}, level="model")

    def number(name: str, key: str, value: int, message: str) -> Case:
        changed = keys() | {key: pair(f"llama.{key}".encode(), U32, u32(value))}
        return case(name, f"{key} is plausible", message, changed)

    def without(key: str) -> Case:
        slug = key.replace(".", "-").replace("_", "-")
        left = {name: fields for name, fields in keys().items() if name != key}
        return case(f"{slug}-missing", f"{key} is there", key, left)

    heads = pair(b"llama.attention.head_count", STR, string(b"2"))
    eps = pair(f"llama.{EPS}".encode(), F32, f32(float("nan")))
    tokens = pair(TOKENS.encode(), ARRAY, array(I32, 2, u32(1) + u32(2)))
    return [
        number("block-count-million", "block_count", 10**6, "out of range"),
        number("block-count-0", "block_count", 0, "out of range"),
        number("head-count-0", "attention.head_count", 0, "out of range"),
        number("head-count-not-dividing", "attention.head_count", 3, "contradicts"),
        number("kv-head-count-not-dividing", "attention.head_count_kv", 3, "do not divide"),
        number("rope-dimension-odd", "rope.dimension_count", 3, "contradicts"),
        number("vocab-size-contradicts-tokens", "vocab_size", 3, "token"),
        number("embedding-length-2-31", "embedding_length", 2**31, ""),
        without("block_count"),
        without("embedding_length"),
        without(EPS),
        case(
            "head-count-string", "a key has its type", "an integer", keys() | {"attention.head_count": heads}
        ),
        case("epsilon-nan", "numbers are finite", "finite", keys() | {EPS: eps}),
        case("tokens-of-integers", "an array has its element type", "strings", keys() | {TOKENS: tokens}),
    ]
