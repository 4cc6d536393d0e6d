"""The reference runtime: a Llama forward pass in numpy, the executable specification.

One function a step: embed, then per layer normalise, attend, normalise, SwiGLU, and at the end
normalise and project on the vocabulary. Everything is computed in one working dtype, float64 (the
specification) or float32, but for the rotary angles: they are float32 in every transformers model,
and part of what it is (:mod:`irq_formats.rope`). Transformers also rounds to float32 inside RMSNorm,
in an order that depends on the machine; that is noise, and all that separates this file from a model
in ``torch.float64``: NMSE 8e-14 of the logits of SmolLM2-135M.

Weights come by stock GGUF name from :mod:`irq_runtime.weights`; a linear layer is
``x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from irq_formats.errors import UsageError
from irq_formats.model import ModelConfig
from irq_runtime.kv_cache import KVCache
from irq_runtime.rope import rotate, rotation
from irq_runtime.weights import Weights, open_weights

__all__ = ["ReferenceModel", "ReferenceSession", "attention", "load_model", "rms_norm", "silu"]

FloatArray = NDArray[np.floating]

#: Query positions attended to at once: bounds the score matrix to heads * 128 * context.
_QUERY_CHUNK = 128


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """Divide by the root mean square over the last axis, then scale (arXiv 1910.07467).

    Args:
        x: ``(..., width)``.
        weight: ``(width,)``, dtype of ``x``.
        eps: Added to the mean square.
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    unit: FloatArray = x / np.sqrt(mean_square + x.dtype.type(eps))
    return weight * unit


def silu(x: FloatArray) -> FloatArray:
    """Return ``x * sigmoid(x)``."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        gated: FloatArray = x / (1 + np.exp(-x))
    return gated


def attention(q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
    """Causal attention of the last n of T positions, with grouped key-value heads (arXiv 2305.13245).

    Args:
        q: ``(n, heads, head_dim)``; row i stands at position T - n + i.
        k: ``(kv_heads, T, head_dim)``.
        v: ``(kv_heads, T, head_dim)``.

    Returns:
        ``(n, heads, head_dim)``.
    """
    n, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    grouped = q.reshape(n, kv_heads, heads // kv_heads, head_dim)
    out = np.empty_like(grouped)
    for begin in range(0, n, _QUERY_CHUNK):
        rows = slice(begin, min(begin + _QUERY_CHUNK, n))
        position = np.arange(rows.start, rows.stop) + length - n  # (c,)
        seen = int(position[-1]) + 1  # columns that any row of the chunk may see
        future = np.arange(seen)[None] > position[:, None]  # (c, seen)
        queries = grouped[rows].transpose(1, 2, 0, 3)  # (kv_heads, group, c, head_dim)
        scores = queries @ k[:, None, :seen].transpose(0, 1, 3, 2) / np.sqrt(head_dim).astype(q.dtype)
        scores[..., future] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        probabilities = np.exp(scores)
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        out[rows] = (probabilities @ v[:, None, :seen]).transpose(2, 0, 1, 3)
    return out.reshape(n, heads, head_dim)


class ReferenceModel:
    """A model that can be asked for logits.

    Attributes:
        config: What the network is.
        weights: Its tensors and adapter.
    """

    def __init__(self, weights: Weights) -> None:
        self.config: ModelConfig = weights.config
        self.weights = weights

    def new_cache(self, dtype: DTypeLike = np.float64) -> KVCache:
        """Return an empty cache; its dtype is the working dtype of every step made with it."""
        c = self.config
        return KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, dtype)

    def logits(self, tokens: Sequence[int], dtype: DTypeLike = np.float64) -> FloatArray:
        """Return the logits after every token, ``(n, vocab_size)``."""
        return self.step(tokens, self.new_cache(dtype))

    def step(self, tokens: Sequence[int], cache: KVCache) -> FloatArray:
        """Append tokens to a cache and return the logits after each, ``(n, vocab_size)``."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: Sequence[int], cache: KVCache) -> FloatArray:
        """Append tokens to a cache and return their normalised last states, ``(n, hidden_size)``.

        Raises:
            UsageError: No tokens, or one outside the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise UsageError("tokens must be a non-empty sequence of integers", got=ids.shape)
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UsageError(
                "token outside the vocabulary",
                expected=f"0 to {self.config.vocab_size - 1}",
                got=f"{ids.min()} to {ids.max()}",
            )
        cos_sin = rotation(self.weights.frequencies, cache.length, ids.size)
        x = self._tensor("token_embd.weight", cache)[ids]  # (n, hidden_size)
        for layer in range(self.config.num_hidden_layers):
            x = x + self._attend(layer, self._norm(f"blk.{layer}.attn_norm", x, cache), cos_sin, cache)
            x = x + self._feed_forward(layer, self._norm(f"blk.{layer}.ffn_norm", x, cache), cache)
        cache.advance(ids.size)
        return self._norm("output_norm", x, cache)

    def session(self, dtype: DTypeLike = np.float64) -> ReferenceSession:
        """Return an empty context for :func:`irq_runtime.sampling.generate`."""
        return ReferenceSession(self, dtype)

    def head(self, hidden: FloatArray) -> FloatArray:
        """Project normalised states ``(n, hidden_size)`` on the vocabulary, ``(n, vocab_size)``."""
        name = "token_embd" if self.config.tie_word_embeddings else "output"
        return self._linear(name, hidden)

    def _tensor(self, name: str, cache: KVCache) -> FloatArray:
        return self.weights.tensor(name, cache.dtype)

    def _norm(self, name: str, x: FloatArray, cache: KVCache) -> FloatArray:
        return rms_norm(x, self._tensor(f"{name}.weight", cache), self.config.rms_norm_eps)

    def _linear(self, name: str, x: FloatArray) -> FloatArray:
        y = x @ self.weights.tensor(f"{name}.weight", x.dtype).T
        if f"{name}.bias" in self.weights:
            y += self.weights.tensor(f"{name}.bias", x.dtype)
        if (lora := self.weights.lora(name, x.dtype)) is not None:
            y += lora.scaling * ((x @ lora.lora_a.T) @ lora.lora_b.T)
        return y

    def _attend(
        self, layer: int, x: FloatArray, cos_sin: tuple[NDArray[np.float32], ...], cache: KVCache
    ) -> FloatArray:
        c, n, name = self.config, x.shape[0], f"blk.{layer}.attn_"
        q = self._linear(name + "q", x).reshape(n, c.num_attention_heads, c.head_dim)
        k = self._linear(name + "k", x).reshape(n, c.num_key_value_heads, c.head_dim)
        v = self._linear(name + "v", x).reshape(n, c.num_key_value_heads, c.head_dim)
        if c.qk_norm:
            q = self._norm(name + "q_norm", q, cache)
            k = self._norm(name + "k_norm", k, cache)
        cos, sin = cos_sin
        q = rotate(q, cos, sin, c.rope_style)
        k = rotate(k, cos, sin, c.rope_style)
        keys, values = cache.append(layer, k, v)
        return self._linear(name + "output", attention(q, keys, values).reshape(n, -1))

    def _feed_forward(self, layer: int, x: FloatArray, cache: KVCache) -> FloatArray:
        name = f"blk.{layer}.ffn_"
        inner = silu(self._linear(name + "gate", x)) * self._linear(name + "up", x)
        return self._linear(name + "down", inner)


class ReferenceSession:
    """A model and the context it has read: implements :class:`irq_runtime.sampling.StepModel`."""

    def __init__(self, model: ReferenceModel, dtype: DTypeLike) -> None:
        self._model = model
        self.cache = model.new_cache(dtype)

    def next_logits(self, tokens: Sequence[int]) -> FloatArray:
        """Append tokens and return the logits after the last one, ``(vocab_size,)``."""
        last: FloatArray = self._model.head(self._model.hidden(tokens, self.cache)[-1:])[0]
        return last


def load_model(
    path: str | Path, adapter: str | Path | None = None, adapter_scale: float = 1.0
) -> ReferenceModel:
    """Open a GGUF file of the irq or a stock profile, with or without an adapter.

    Args:
        path: Model file.
        adapter: Adapter file of the same profile; None: what the model embeds, if anything.
        adapter_scale: Multiplier of the adapter (stock pairs carry tau in it: keep 1).

    Raises:
        MalformedFile: A file breaks its specification.
        UnsupportedModel: Another architecture, or a block type the reference does not decode.
        WrongBase: The adapter belongs to another base, or to another pair.
        UsageError: The base of a pair without its adapter, or a scale without an adapter.
    """
    return ReferenceModel(open_weights(path, adapter, adapter_scale))
