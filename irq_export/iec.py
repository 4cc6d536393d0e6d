"""IEC-LoRA as torch modules: train it, attach a stored adapter, take one out again.

The forward is that of :mod:`irq_formats.adapter` (U2 after U1, equation 16 interleaved). With the betas fixed
the elastic connections are linear, so every forward pass adds them to A and B and then computes an ordinary
LoRA product: the work that depends on the number of tokens is that of plain LoRA, and the gradients of the
betas are those of the unfolded form. Dropout acts on the input of A only; the elastic connection sees the
undropped features, as in the released code: with dropout the first connection is computed beside A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irq_export.block_iec import block_iec_linear
from irq_export.block_linear import compute_dtype
from irq_export.block_modules import IrqLinear
from irq_export.elastic import add_elastic, elastic_weight
from irq_formats.adapter import Adapter, LoraLayer, random_layer
from irq_formats.errors import UsageError, WrongBase

__all__ = [
    "IecLinear",
    "add_elastic",
    "attach",
    "detach",
    "elastic_weight",
    "extract",
    "iec_linear",
    "random_adapter",
]


def iec_linear(
    base: nn.Module,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    *,
    scaling: float = 1.0,
    dropout: nn.Module | None = None,
) -> Tensor:
    """Return ``base(x) + scaling * U2(U1(x))``.

    The branch runs in autocast's dtype, else in that of ``lora_a``. Where that is also the dtype of ``x``
    and the base is an :class:`IrqLinear`, base and branch are one operation that adds into one result.

    Args:
        base: The frozen layer.
        x: (..., in).
        lora_a: A, (r, in).
        lora_b: B, (out, r).
        beta1: Weight of the elastic connection around A, (1,).
        beta2: The same around B.
        scaling: Multiplier of the branch.
        dropout: Applied to the input of A.

    Returns:
        (..., out) in the dtype of ``base(x)``.
    """
    dtype = compute_dtype(x, lora_a.dtype)
    drops = _drops(dropout)
    if not drops and isinstance(base, IrqLinear) and compute_dtype(x) == dtype:
        return block_iec_linear(x, base.parts(), base.bias, lora_a, lora_b, beta1, beta2, scaling, dtype)
    b = elastic_weight(lora_b, beta2, scaling=scaling, dtype=dtype)
    if drops:
        wide = x.to(dtype)
        hidden = add_elastic(F.linear(cast("nn.Module", dropout)(wide), lora_a), wide, beta1)
        y: Tensor = base(x)
        return y + F.linear(hidden.to(dtype), b).to(y.dtype)
    a = elastic_weight(lora_a, beta1, dtype=dtype)
    y = base(x)
    return y + F.linear(F.linear(x.to(dtype), a), b).to(y.dtype)


def _drops(dropout: nn.Module | None) -> bool:
    """Whether a dropout layer changes its input now."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


class IecLinear(nn.Module):
    """A frozen linear layer plus a trainable IEC-LoRA branch.

    ``forward(x) = base(x) + scaling * U2(U1(x))`` with U1(x) = A drop(x) + beta1 * elastic(x) and
    U2(z) = B z + beta2 * elastic(z). A starts Kaiming-uniform, B and both betas at 0, so a fresh layer
    computes what its base computes.

    Args:
        base: Any module with ``in_features`` and ``out_features``; its parameters are frozen.
        rank: Rank r.
        scaling: Multiplier of the whole branch, usually alpha / r.
        dropout: Probability for the input of A.
        dtype: Of the branch; float32 if None.
        device: Of the branch; that of the base if None.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError("an IEC layer needs a rank", expected="rank >= 1", got=rank)
        self.in_features, self.out_features = _features(base)
        self.scaling = scaling
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        dtype = dtype or torch.float32
        device = device or _device(base)
        self.lora_a = nn.Parameter(torch.empty((rank, self.in_features), dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros((self.out_features, rank), dtype=dtype, device=device))
        self.beta1 = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        self.beta2 = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=sqrt(5))

    @property
    def rank(self) -> int:
        """Rank r of the branch."""
        return self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return iec_linear(
            self.base,
            x,
            self.lora_a,
            self.lora_b,
            self.beta1,
            self.beta2,
            scaling=self.scaling,
            dropout=self.dropout,
        )

    @torch.no_grad()
    def load_layer(self, layer: LoraLayer) -> None:
        """Copy A, B, the betas and the scaling of a stored layer of the same rank and shape."""
        self.lora_a.copy_(torch.from_numpy(np.ascontiguousarray(layer.lora_a)))
        self.lora_b.copy_(torch.from_numpy(np.ascontiguousarray(layer.lora_b)))
        self.beta1.fill_(layer.beta1)
        self.beta2.fill_(layer.beta2)
        self.scaling = layer.scaling

    def to_layer(self) -> LoraLayer:
        """Return the branch as a stored layer (float32)."""
        return LoraLayer(
            lora_a=self.lora_a.detach().float().cpu().numpy().copy(),
            lora_b=self.lora_b.detach().float().cpu().numpy().copy(),
            beta1=self.beta1.item(),
            beta2=self.beta2.item(),
            scaling=self.scaling,
        )

    def extra_repr(self) -> str:
        """Describe the branch in ``print(model)``."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


def attach(
    model: nn.Module,
    adapter: Adapter,
    dtype: torch.dtype | None = None,
    *,
    dropout: float = 0.0,
) -> list[str]:
    """Wrap every linear layer the adapter names, in place.

    Nothing is changed unless all layers are found and fit.

    Args:
        model: Model with the module names of the adapter (Hugging Face's).
        adapter: What to attach.
        dtype: Of the branches; float32 if None.
        dropout: For further training.

    Returns:
        Names of the wrapped modules, in the order of the adapter.

    Raises:
        WrongBase: The model has no such layer, or one of another shape.
        UsageError: A layer carries an adapter already.
    """
    bases = {name: _find_linear(model, name, layer) for name, layer in adapter.layers.items()}
    for name, base in bases.items():
        layer = adapter.layers[name]
        wrapped = IecLinear(base, layer.rank, dropout=dropout, dtype=dtype)
        wrapped.load_layer(layer)
        wrapped.train(model.training)
        model.set_submodule(name, wrapped)
    return list(bases)


def detach(model: nn.Module) -> list[str]:
    """Put the base layers back in place of the wrapped ones and return their names."""
    wrapped = dict(_iec_modules(model))
    for name, module in wrapped.items():
        model.set_submodule(name, module.base)
    return list(wrapped)


def extract(
    model: nn.Module,
    *,
    base_hash: str | None = None,
    meta: Mapping[str, object] | None = None,
) -> Adapter:
    """Take the adapter out of a model, as stored arrays; the model keeps it.

    Args:
        model: Model with :class:`IecLinear` layers.
        base_hash: Hash of the quantised base (``Checkpoint.base_hash``).
        meta: Provenance to record.

    Raises:
        UsageError: The model has no such layer.
    """
    layers = {name: module.to_layer() for name, module in _iec_modules(model)}
    if not layers:
        raise UsageError("the model carries no adapter", expected="IecLinear layers", got="none")
    return Adapter(layers, base_hash, dict(meta or {}))


def random_adapter(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    delta_ratio: float = 0.03,
    beta: float = 0.05,
    seed: int = 0,
    select: Callable[[str], bool] = lambda name: not name.endswith("lm_head"),
    base_hash: str | None = None,
) -> Adapter:
    """Return a non-zero adapter of the size training leaves behind, for tests and benchmarks.

    Args:
        model: Model whose linear layers get a branch.
        rank: Rank of every layer.
        alpha: The scaling is alpha / rank.
        delta_ratio: Norm of scaling·BA relative to the norm of the adapted weight.
        beta: Standard deviation of the betas.
        seed: Same seed, same model shape, same numbers.
        select: Which linear layers, by module name.
        base_hash: Recorded in the adapter.
    """
    rng = np.random.default_rng(seed)
    layers = {
        name: random_layer(
            (module.out_features, module.in_features),
            _weight_norm(module),
            rng,
            rank=rank,
            alpha=alpha,
            delta_ratio=delta_ratio,
            beta=beta,
        )
        for name, module in model.named_modules()
        if _is_linear(module) and select(name)
    }
    return Adapter(layers, base_hash, {"task_type": "CAUSAL_LM"})


def _iec_modules(model: nn.Module) -> Iterator[tuple[str, IecLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, IecLinear))


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear module."""
    if not _is_linear(module):
        raise UsageError(
            "an adapter needs a linear layer",
            expected="a module with in_features and out_features",
            got=type(module).__name__,
        )
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def _find_linear(model: nn.Module, name: str, layer: LoraLayer) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise WrongBase(
            "the adapter names a layer that the model does not have",
            where=name,
            hint="The adapter belongs to another model.",
        ) from error
    if isinstance(module, IecLinear):
        raise UsageError("the layer carries an adapter already", where=name, hint="detach() it.")
    n_in, n_out = _features(module)
    if layer.shape != (n_out, n_in):
        raise WrongBase(
            "the adapter does not fit the layer",
            where=name,
            expected=f"(out, in) = {(n_out, n_in)}",
            got=layer.shape,
            hint="The adapter belongs to another model.",
        )
    return module


def _device(module: nn.Module) -> torch.device | None:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else None


def _weight_norm(module: nn.Module) -> float:
    """Return the Frobenius norm of a linear module's weight, dequantised if it stores none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = cast("Callable[[], Tensor]", module.dequantize)()
    return float(torch.linalg.vector_norm(weight.detach().float()).item())
