"""The logits and greedy levels of the native engine, both modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from irq_export.parity.gates import FAST_NMSE, FLOAT32_NMSE, KERNEL_RATIO, LOSSY_NMSE
from irq_export.parity.levels import greedy_level
from irq_export.parity.metrics import LogitMetrics, compare
from irq_export.parity.report import Check
from irq_export.parity.runtimes import NativeRuntime, Runtime
from irq_export.parity.target import Target
from irq_formats.errors import UnsupportedModel

__all__ = ["native_level"]


def native_level(
    target: Target,
    trained: Runtime,
    expected: NDArray[np.floating],
    tokens: NDArray[np.integer],
    *,
    prompt: Sequence[int],
    greedy: int,
    adapter_scale: float,
    threads: int,
    exact_weights: bool,
    noise: Mapping[str, float] | None,
) -> Iterator[Check]:
    """Yield the checks of the native engine against torch in float32.

    Args:
        target: The export.
        trained: The PyTorch model in float32.
        expected: Its logits on ``tokens``, ``(n, vocab)``.
        tokens: The text, ``(n,)``.
        prompt: Tokens to continue.
        greedy: Tokens to generate; 0 skips the level.
        adapter_scale: The user's scale of the adapter.
        threads: Compute threads.
        exact_weights: Whether the file holds the trained weights bit for bit.
        noise: ``nmse`` and ``kl_mean`` of llama.cpp's own 8-bit kernels on these weights, if measured.
    """
    context = max(len(tokens), len(prompt) + greedy)
    for mode in ("exact", "fast"):
        try:
            runtime = NativeRuntime(target.model, target.adapter, adapter_scale, mode, threads, context)
        except UnsupportedModel as error:
            yield Check("logits", "native", None, str(error))
            return
        metrics = compare(expected, runtime.logits(tokens), tokens)
        bound = FLOAT32_NMSE if mode == "exact" else FAST_NMSE
        kl_bound = None
        if mode == "fast" and noise is not None:
            bound = KERNEL_RATIO * max(noise["nmse"], FLOAT32_NMSE)
            kl_bound = KERNEL_RATIO * max(noise["kl_mean"], FLOAT32_NMSE)
        if not exact_weights:
            bound, kl_bound = max(bound, LOSSY_NMSE), None
        yield _check(f"{runtime.name} against {trained.name}", metrics, bound, kl_bound)
        if greedy:
            same_tokens = exact_weights and mode == "exact"
            yield greedy_level(trained, runtime, prompt, greedy, exact=same_tokens)


def _check(name: str, metrics: LogitMetrics, bound: float, kl_bound: float | None) -> Check:
    gate = f"NMSE <= {bound:.3g}" + ("" if kl_bound is None else f", KL <= {kl_bound:.3g}")
    return Check(
        "logits",
        name,
        metrics.nmse <= bound and (kl_bound is None or metrics.kl_mean <= kl_bound),
        f"NMSE {metrics.nmse:.2e}, KL {metrics.kl_mean:.2e}, top-1 {metrics.top1:.1%}, "
        f"perplexity {metrics.perplexity:.4f} ({metrics.perplexity_reference:.4f})",
        {**metrics.to_dict(), "nmse_bound": bound},
        gate,
    )
