"""LoRA adapters with an Information Elastic Connection (IEC), and the algebra that folds them.

An IEC-LoRA layer adds to a frozen linear layer (IR-QLoRA, arXiv 2402.05445, equations 11 to 16)::

    x' = x Aᵀ + beta1 · elastic(x, r)           A: lora_a (r, in)
    y  = x' Bᵀ + beta2 · elastic(x', out)       B: lora_b (out, r)
    out = base(x) + scaling · y                 scaling: alpha / r, over the elastic terms too

``elastic(v, width)`` splits ``v`` into ``g = gcd(len(v), width)`` contiguous groups, takes their means and
repeats each mean ``width / g`` times in a row (the interleaved form of equation 16, which is also what the
released code does). It is linear in ``v``, so with beta fixed the layer *is* a plain LoRA of the same rank::

    A' = A + beta1 · Pᵀ,   B' = B + beta2 · Rᵀ   (P, R: elastic written as a matrix)

The block offset tau of the quantised base folds too, as one more rank per block of the input: a row of ones
over the block in A, the block's tau in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd, isfinite

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile, UsageError, WrongBase

__all__ = [
    "Adapter",
    "LoraLayer",
    "branch",
    "check_base_hash",
    "delta_weight",
    "elastic",
    "fold",
    "fold_adapter_layers",
    "random_layer",
    "tau_extra_rank",
    "unify_rank",
]

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class LoraLayer:
    """One adapted linear layer.

    Attributes:
        lora_a: Down projection, (r, in), float32.
        lora_b: Up projection, (out, r), float32.
        beta1: Weight of the elastic connection over A; 0 in a plain LoRA.
        beta2: Weight of the elastic connection over B; 0 in a plain LoRA.
        scaling: Multiplier of the whole branch (alpha / r, or alpha / sqrt(r) for rsLoRA).
    """

    lora_a: FloatArray
    lora_b: FloatArray
    beta1: float = 0.0
    beta2: float = 0.0
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rank r of the branch."""
        return int(self.lora_a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the adapted weight."""
        return int(self.lora_b.shape[0]), int(self.lora_a.shape[1])

    @property
    def has_iec(self) -> bool:
        """Whether an elastic connection is present, so that the layer is not yet a plain LoRA."""
        return self.beta1 != 0.0 or self.beta2 != 0.0

    def validate(self, where: object = None) -> None:
        """Check shapes and values.

        Args:
            where: File or module to name in the error.

        Raises:
            MalformedFile: Rank 0, a pair that does not fit together, NaN or infinity.
        """
        a, b = self.lora_a, self.lora_b
        if a.ndim != 2 or b.ndim != 2:
            raise MalformedFile(
                "lora_A and lora_B must be matrices",
                where=where,
                expected="(r, in) and (out, r)",
                got=f"{a.shape} and {b.shape}",
            )
        if a.shape[0] == 0 or b.shape[1] == 0:
            raise MalformedFile(
                "the adapter has rank 0",
                where=where,
                expected="rank >= 1",
                got=f"lora_A {a.shape}, lora_B {b.shape}",
                hint="Leave the layer out instead of storing an empty one.",
            )
        if a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
            raise MalformedFile(
                "lora_A and lora_B do not form a pair",
                where=where,
                expected="lora_A (r, in), lora_B (out, r) with the same r and no empty dimension",
                got=f"lora_A {a.shape}, lora_B {b.shape}",
            )
        for name, value in [
            ("beta1", self.beta1),
            ("beta2", self.beta2),
            ("scaling", self.scaling),
        ]:
            if not isfinite(value):
                raise MalformedFile(
                    f"{name} is not a finite number", where=where, expected="finite", got=value
                )
        for name, array in [("lora_A", a), ("lora_B", b)]:
            if not np.isfinite(array).all():
                raise MalformedFile(
                    f"{name} holds NaN or infinity",
                    where=where,
                    expected="finite values",
                    got=f"{int((~np.isfinite(array)).sum())} of {array.size} not finite",
                    hint="The training run diverged; export an earlier checkpoint.",
                )


@dataclass(frozen=True)
class Adapter:
    """All adapted layers of a model.

    Attributes:
        layers: Hugging Face module name ("model.layers.0.self_attn.q_proj") to layer.
        base_hash: Hash of the quantised base the adapter was trained against, if recorded.
        meta: Provenance that does not change the numbers (base model name, task type, key style).
    """

    layers: Mapping[str, LoraLayer]
    base_hash: str | None = None
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def has_iec(self) -> bool:
        """Whether any layer carries an elastic connection."""
        return any(layer.has_iec for layer in self.layers.values())


def elastic(x: FloatArray, width: int) -> FloatArray:
    """Stretch or shrink the last axis by group means (equation 16, as a function).

    Args:
        x: Features, (..., n).
        width: Width m of the result.

    Returns:
        (..., m): element j is the mean of group ``j // (m/g)`` of x, with ``g = gcd(n, m)`` groups.
    """
    n = x.shape[-1]
    groups = gcd(n, width)
    means = x.reshape(*x.shape[:-1], groups, n // groups).mean(axis=-1)
    return np.repeat(means, width // groups, axis=-1)


def check_base_hash(adapter_hash: str | None, base_hash: str | None, where: object) -> None:
    """Check that an adapter was trained against a base, where both say which one.

    Args:
        adapter_hash: What the adapter records.
        base_hash: That of the base it is to be applied to.
        where: The adapter, for the error.

    Raises:
        WrongBase: They differ.
    """
    if adapter_hash is not None and base_hash is not None and adapter_hash != base_hash:
        raise WrongBase(
            "the adapter was trained against another quantised base",
            where=where,
            expected=f"base hash {base_hash}",
            got=adapter_hash,
            hint="Use it with the checkpoint it was trained on",
        )


def branch(layer: LoraLayer, x: FloatArray) -> FloatArray:
    """Compute the branch on features x (..., in) without folding: the specification, (..., out)."""
    hidden = x @ layer.lora_a.T + layer.beta1 * elastic(x, layer.rank)  # (..., r)
    y = hidden @ layer.lora_b.T + layer.beta2 * elastic(hidden, layer.shape[0])
    result: FloatArray = layer.scaling * y
    return result


def fold(layer: LoraLayer) -> LoraLayer:
    """Fold the elastic connections into A and B; same rank, same scaling, beta 0.

    Exact in real arithmetic; each touched element is computed in float64 and rounded once to its own
    dtype. Source: IR-QLoRA appendix A.2 and equation 16.
    """
    if not layer.has_iec:
        return layer
    return replace(
        layer,
        lora_a=_add_elastic(layer.lora_a, layer.beta1),
        lora_b=_add_elastic(layer.lora_b, layer.beta2),
        beta1=0.0,
        beta2=0.0,
    )


def fold_adapter_layers(adapter: Adapter) -> Adapter:
    """Fold every layer of an adapter (see :func:`fold`)."""
    return replace(adapter, layers={name: fold(layer) for name, layer in adapter.layers.items()})


def unify_rank(adapter: Adapter) -> Adapter:
    """Give every layer the same rank and, where they differ, the scaling 1.

    For runtimes that know one rank and one alpha per adapter. Ranks are filled up with zeros; a scaling
    moves into B (exact when it is a power of two). Elastic connections are folded, since they depend on
    the rank.
    """
    layers = fold_adapter_layers(adapter).layers
    rank = max(layer.rank for layer in layers.values())
    same_scaling = len({layer.scaling for layer in layers.values()}) == 1
    unified = {
        name: _fill_rank(layer if same_scaling else _unscaled(layer), rank) for name, layer in layers.items()
    }
    return replace(adapter, layers=unified)


def _unscaled(layer: LoraLayer) -> LoraLayer:
    """Move the scaling into B, computed in float64 and rounded once."""
    lora_b = (layer.scaling * layer.lora_b.astype(np.float64)).astype(layer.lora_b.dtype)
    return replace(layer, lora_b=lora_b, scaling=1.0)


def _fill_rank(layer: LoraLayer, rank: int) -> LoraLayer:
    missing = (0, rank - layer.rank)
    return replace(
        layer,
        lora_a=np.pad(layer.lora_a, (missing, (0, 0))),
        lora_b=np.pad(layer.lora_b, ((0, 0), missing)),
    )


def _add_elastic(weight: FloatArray, beta: float) -> FloatArray:
    """Add ``beta`` times the matrix of :func:`elastic` to a weight (rows: results, columns: inputs).

    Element [j, i] of that matrix is g/columns where row j and column i are in the same of the g groups.
    """
    rows, columns = weight.shape
    groups = gcd(rows, columns)
    folded = weight.astype(np.float64)
    tiles = folded.reshape(groups, rows // groups, groups, columns // groups)
    same = np.arange(groups)
    tiles[same, :, same, :] += beta * groups / columns
    return folded.astype(weight.dtype)


def delta_weight(layer: LoraLayer) -> NDArray[np.float64]:
    """Return what the branch adds to the weight, (out, in): scaling · B'A', in float64."""
    wide = replace(
        layer,
        lora_a=layer.lora_a.astype(np.float64),
        lora_b=layer.lora_b.astype(np.float64),
    )
    folded = fold(wide)
    delta: NDArray[np.float64] = layer.scaling * (folded.lora_b @ folded.lora_a)
    return delta


def tau_extra_rank(
    layer: LoraLayer | None, tau: FloatArray, block_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Write the block offsets of the base as extra rank of its adapter.

    With S(x) the sums of x over the input blocks, ``x (tau repeated)ᵀ = S(x) tauᵀ``: so a base without
    tau plus the returned pair, with scaling 1, computes what the base with tau plus the layer computes.
    tau is moved bit for bit; the scaling is folded into B (exact when it is a power of two).

    Args:
        layer: The adapter of the same linear layer, folded here if needed; None if it has none.
        tau: Offsets, (out, in/block_size), float32.
        block_size: Input elements per block.

    Returns:
        ``lora_a`` (r + nb, in): [A'; block indicator], and ``lora_b`` (out, r + nb): [scaling·B' ‖ tau].

    Raises:
        UsageError: The layer does not have the shape that tau implies.
    """
    n_out, n_blocks = tau.shape
    n_in = n_blocks * block_size
    ones = np.repeat(np.eye(n_blocks, dtype=np.float32), block_size, axis=1)  # (nb, in)
    offsets = tau.astype(np.float32, copy=False)  # (out, nb)
    if layer is None:
        return ones, offsets
    if layer.shape != (n_out, n_in):
        raise UsageError(
            "adapter and tau belong to layers of different shape",
            expected=f"(out, in) = {(n_out, n_in)} from tau {tau.shape} at block size {block_size}",
            got=layer.shape,
        )
    folded = _unscaled(fold(layer))
    return (
        np.concatenate([folded.lora_a.astype(np.float32, copy=False), ones], axis=0),
        np.concatenate([folded.lora_b.astype(np.float32, copy=False), offsets], axis=1),
    )


def random_layer(
    shape: tuple[int, int],
    weight_norm: float,
    rng: np.random.Generator,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    delta_ratio: float = 0.03,
    beta: float = 0.05,
) -> LoraLayer:
    """Return a layer of the size that training leaves behind, for tests and benchmarks.

    Args:
        shape: (out, in) of the adapted weight.
        weight_norm: Frobenius norm of the adapted weight.
        rng: Source of randomness.
        rank: Rank r.
        alpha: The scaling is alpha / rank.
        delta_ratio: Norm of scaling·BA, without the elastic terms, relative to ``weight_norm``.
        beta: Standard deviation of the two betas.
    """
    n_out, n_in = shape
    bound = 1 / np.sqrt(n_in)  # Kaiming uniform with a = sqrt(5), as PEFT initialises A
    lora_a = rng.uniform(-bound, bound, size=(rank, n_in))
    lora_b = rng.standard_normal((n_out, rank))
    scaling = alpha / rank
    # norm of BA through the r × r Gram matrices
    norm = scaling * np.sqrt(np.sum((lora_b.T @ lora_b) * (lora_a @ lora_a.T)))
    lora_b *= delta_ratio * weight_norm / norm
    beta1, beta2 = (float(np.float32(value)) for value in beta * rng.standard_normal(2))
    return LoraLayer(lora_a.astype(np.float32), lora_b.astype(np.float32), beta1, beta2, scaling)
