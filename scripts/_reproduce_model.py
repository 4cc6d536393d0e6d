"""A Llama with a dimension of arms: many bases and adapters trained side by side, one batched product each.

The arms of an experiment read the same batch and differ in the numbers of their quantised weights and in
their adapters. So every linear is a batched matrix product over arms, ``(arms, tokens, in) x (arms, in,
out)``, and a step of sixteen arms costs little more than its arithmetic. The base weights are dequantised
once and kept; IEC enters through its exact fold, A' = A + beta1 P^T and B' = B + beta2 R^T, which is
differentiable (irq_formats.adapter, equation 16), so an arm with IEC runs the same products as one without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KINDS", "MODULES", "Adapters", "Arms", "Shape", "Weights", "elastic", "rate_losses"]

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
KINDS = tuple(MODULES)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with a tied head, as a Hugging Face configuration names them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    eps: float
    theta: float

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Shape:
        """Read a Hugging Face ``config.json``."""
        rope = config.get("rope_parameters") or config
        names = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads"
        sizes = [int(config[name]) for name in [*names.split(), "vocab_size"]]  # type: ignore[call-overload]
        return cls(*sizes, float(config["rms_norm_eps"]), float(rope["rope_theta"]))  # type: ignore[arg-type, index]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def linear(self, kind: str) -> tuple[int, int]:
        """(out, in) of a kind of linear."""
        narrow = self.kv_heads * self.head_dim
        out = {"q": self.hidden, "k": narrow, "v": narrow, "o": self.hidden, "down": self.hidden}
        return out.get(kind, self.ffn), self.ffn if kind == "down" else self.hidden


@dataclass(frozen=True)
class Weights:
    """What a forward pass reads.

    Attributes:
        embedding: ``(vocab, hidden)``, the head too.
        norms: ``(2 * layers + 1, hidden)``: before attention and before the ffn of each layer, then the last.
        linears: ``(layers, arms, out, in)`` of each kind.
    """

    embedding: Tensor
    norms: Tensor
    linears: dict[str, Tensor]


def elastic(rows: int, columns: int) -> Tensor:
    """Return P^T float32 ``(rows, columns)``: every row is the mean over its group of columns, times g/rows.

    With g = gcd: entry (j, i) is ``g / columns`` where ``floor(i * g / columns) == floor(j * g / rows)``,
    so ``x @ P`` is what irq_export.iec.add_elastic adds to ``(..., rows)`` from ``x (..., columns)``.
    """
    groups = math.gcd(rows, columns)
    row = torch.arange(rows) * groups // rows
    column = torch.arange(columns) * groups // columns
    return (row[:, None] == column[None, :]).float() * (groups / columns)


class Adapters:
    """LoRA with IEC for every linear of every arm, float32.

    Args:
        shape: Of the model.
        seeds: Of each arm: arms of one seed start from the same A.
        u1: Whether an arm trains beta1.
        u2: Whether an arm trains beta2.
        rank: Rank r.
        scaling: alpha / r.
        device: Where they live.
    """

    def __init__(
        self,
        shape: Shape,
        seeds: Sequence[int],
        u1: Sequence[bool],
        u2: Sequence[bool],
        *,
        rank: int,
        scaling: float,
        device: str | torch.device = "cpu",
    ) -> None:
        self.scaling = scaling
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.p: dict[str, Tensor] = {}
        self.r: dict[str, Tensor] = {}
        for index, kind in enumerate(KINDS):
            n_out, n_in = shape.linear(kind)
            start = {}
            for seed in set(seeds):
                generator = torch.Generator().manual_seed(1000 * seed + index)
                start[seed] = torch.rand((shape.layers, rank, n_in), generator=generator) * 2 - 1
            a = torch.stack([start[seed] for seed in seeds], dim=1) / math.sqrt(
                n_in
            )  # as Kaiming, a = sqrt 5
            self.a[kind] = a.to(device).requires_grad_()
            self.b[kind] = torch.zeros(
                (shape.layers, len(seeds), n_out, rank), device=device, requires_grad=True
            )
            self.p[kind] = elastic(rank, n_in).to(device)
            self.r[kind] = elastic(n_out, rank).to(device)
        self.beta = torch.zeros((len(KINDS), 2, shape.layers, len(seeds)), device=device, requires_grad=True)
        self.mask = torch.tensor([list(u1), list(u2)], dtype=torch.float32, device=device)  # (2, arms)
        self.iec = bool(self.mask.any())

    def parameters(self) -> list[Tensor]:
        """All trained tensors."""
        return [*self.a.values(), *self.b.values(), *([self.beta] if self.iec else [])]

    def folded(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (kind, A' ``(layers, arms, r, in)``, B' ``(layers, arms, out, r)``) in a dtype."""
        for index, kind in enumerate(KINDS):
            a, b = self.a[kind], self.b[kind]
            if self.iec:
                beta1, beta2 = (self.beta[index] * self.mask[:, None])[
                    ..., None, None
                ]  # (layers, arms, 1, 1)
                a, b = a + beta1 * self.p[kind], b + beta2 * self.r[kind]
            yield kind, a.to(dtype), b.to(dtype)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients of each arm to a norm of at most ``max_norm``; return the norms (arms,)."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        arm = [g.ndim - 1 if g.shape[:2] == (len(KINDS), 2) else 1 for g in grads]
        others = [tuple(d for d in range(g.ndim) if d != a) for g, a in zip(grads, arm, strict=True)]
        norms = torch.stack([g.square().sum(dim=o) for g, o in zip(grads, others, strict=True)]).sum(0).sqrt()
        factor = (max_norm / (norms + 1e-6)).clamp(max=1)
        for grad, axis in zip(grads, arm, strict=True):
            grad.mul_(factor.view([-1 if d == axis else 1 for d in range(grad.ndim)]))
        return norms


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., L, head_dim), halves paired; cos and sin (L, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, in float32, rounded before the weight as transformers does."""
    f = x.float()
    return weight * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Arms:
    """The forward pass of all arms.

    Args:
        shape: Of the model.
        weights: In the dtype to compute in.
        adapters: Of the arms, if any.
        fuse: Compile the element-wise parts (CUDA).
    """

    def __init__(
        self, shape: Shape, weights: Weights, adapters: Adapters | None = None, *, fuse: bool = False
    ) -> None:
        self.shape, self.weights, self.adapters = shape, weights, adapters
        fused: Callable[..., Callable[..., Tensor]] = torch.compile if fuse else lambda f, **_: f
        self._rotate = fused(_rotate, dynamic=True)
        self._swiglu = fused(_swiglu, dynamic=True)
        self._norm = fused(_norm, dynamic=True)
        #: Called with (kind, layer, input (arms, tokens, in)), for calibration.
        self.watch: Callable[[str, int, Tensor], None] | None = None

    @property
    def arms(self) -> int:
        """How many arms there are."""
        return self.weights.linears["q"].shape[1]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Run token ids (arms or 1, B, L): states before the last norm, (arms, B * L, hidden)."""
        s, w = self.shape, self.weights
        _, batch, length = tokens.shape
        x = F.embedding(tokens, w.embedding).flatten(1, 2).expand(self.arms, -1, -1)
        half = s.head_dim // 2
        frequency = s.theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        angle = torch.arange(length, device=x.device, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        # Taken apart at once: the gradient of an index would be as large as all layers, for every layer.
        base = {kind: stacked.unbind(0) for kind, stacked in w.linears.items()}
        folded = {}
        if self.adapters is not None:
            folded = {k: (a.unbind(0), b.unbind(0)) for k, a, b in self.adapters.folded(x.dtype)}

        def linear(kind: str, layer: int, x: Tensor) -> Tensor:
            if self.watch is not None:
                self.watch(kind, layer, x)
            y = torch.bmm(x, base[kind][layer].mT)
            if not folded:
                return y
            a, b = folded[kind]
            low = torch.bmm(x, a[layer].mT)
            return y.baddbmm_(low, b[layer].mT, alpha=self.adapters.scaling)  # type: ignore[union-attr]

        def heads(y: Tensor, count: int) -> Tensor:  # (arms, B * L, count * dim) -> (arms * B, count, L, dim)
            return y.reshape(self.arms * batch, length, count, s.head_dim).transpose(1, 2)

        for layer in range(s.layers):
            y = self._norm(x, w.norms[2 * layer], s.eps)
            q = self._rotate(heads(linear("q", layer, y), s.heads), cos, sin)
            k = self._rotate(heads(linear("k", layer, y), s.kv_heads), cos, sin)
            v = heads(linear("v", layer, y), s.kv_heads)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=s.kv_heads != s.heads)
            y = y.transpose(1, 2).reshape(self.arms, batch * length, s.hidden)
            x = x + linear("o", layer, y)
            y = self._norm(x, w.norms[2 * layer + 1], s.eps)
            y = self._swiglu(linear("gate", layer, y), linear("up", layer, y))
            x = x + linear("down", layer, y)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """States (..., hidden) before the last norm to logits (..., vocab)."""
        return self._norm(hidden, self.weights.norms[-1], self.shape.eps) @ self.weights.embedding.mT

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """The same in float32 whatever the dtype of the arms, for measuring.

        In bfloat16 logits of 16 to 32 lie on a grid of 0.125, where choices of one token are often equal.
        """
        w = self.weights
        return _norm(hidden.float(), w.norms[-1].float(), self.shape.eps) @ w.embedding.float().mT

    def losses(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, nats, of each arm (arms,).

        Args:
            tokens: (arms or 1, B, L).
            positions: (arms or 1, n) into B * L: where a prediction counts.
            targets: (arms or 1, n): the next token, or -100 for padding.
        """
        hidden = self.hidden(tokens)
        positions, targets = (t.expand(self.arms, -1) for t in (positions, targets))
        picked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.logits(picked).flatten(0, 1).float()
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
        return nats.view(targets.shape).sum(1) / (targets >= 0).sum(1)


def rate_losses(step_losses: np.ndarray, window: int) -> np.ndarray:
    """Means of (steps, arms) over windows of steps: (steps // window, arms)."""
    steps = len(step_losses) // window * window
    return step_losses[:steps].reshape(-1, window, step_losses.shape[1]).mean(axis=1)
