"""The logits level of stock llama.cpp, whose own kernels round activations to 8 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_export.export.gguf.merged import merged_tensors
from irq_export.export.gguf.stock_profile import rope_tensors, stock_header
from irq_export.parity.gates import FLOAT32_NMSE, KERNEL_RATIO, LOSSY_NMSE
from irq_export.parity.metrics import compare
from irq_export.parity.report import Check, nmse_check
from irq_export.parity.runtimes import LlamaCppRuntime
from irq_export.parity.target import Target
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import Checkpoint
from irq_formats.gguf import GgmlType, write_gguf

__all__ = ["llamacpp_level"]


def llamacpp_level(
    target: Target,
    llama: LlamaCppRuntime,
    checkpoint: Checkpoint,
    adapter: Adapter,
    trained: NDArray[np.floating],
    tokens: NDArray[np.integer],
    *,
    adapter_scale: float,
    threads: int,
) -> Iterator[Check]:
    """Yield the checks against stock llama.cpp.

    First the float32 re-expansion of the checkpoint (W + scaling·B'A' merged in float, no 8-bit
    activations): it shows that llama.cpp computes the network that was trained. Then the file itself,
    whose kernels round activations: its distance from torch must not exceed :data:`KERNEL_RATIO` times
    the kernels' own noise, which is the distance of the file, adapter at scale 1, from that re-expansion
    (their weights are equal: the tensor level has shown that).

    Args:
        target: The export, a stock one.
        llama: llama.cpp with it, the adapter at ``adapter_scale``.
        checkpoint: What it was made from.
        adapter: As trained; no layers for none.
        trained: Logits of torch in float32, ``(n, vocab)``.
        tokens: The text, ``(n,)``.
        adapter_scale: The user's scale of the adapter.
        threads: Compute threads.
    """
    float32 = _float32_logits(target, checkpoint, adapter, tokens, threads)
    yield nmse_check(
        "llama.cpp on the float32 re-expansion against torch float32",
        compare(trained, float32, tokens),
        FLOAT32_NMSE,
    )
    logits = whole = llama.logits(tokens)
    if adapter_scale != 1:
        with LlamaCppRuntime(target.model, target.adapter, 1.0, threads, len(tokens)) as unscaled:
            whole = unscaled.logits(tokens)
    metrics, noise = compare(trained, logits, tokens), compare(float32, whole, tokens)
    ratios = metrics.nmse / max(noise.nmse, FLOAT32_NMSE), metrics.kl_mean / max(noise.kl_mean, FLOAT32_NMSE)
    yield Check(
        "logits",
        "llama.cpp against torch float32",
        all(ratio <= KERNEL_RATIO for ratio in ratios) and metrics.nmse <= LOSSY_NMSE,
        f"NMSE {metrics.nmse:.2e}, KL {metrics.kl_mean:.2e}, top-1 {metrics.top1:.1%}; "
        f"its own kernels' noise: NMSE {noise.nmse:.2e}, KL {noise.kl_mean:.2e}",
        {**metrics.to_dict(), "kernel_noise": noise.to_dict()},
        f"<= {KERNEL_RATIO} x that noise, NMSE <= {LOSSY_NMSE:g}",
    )


def _float32_logits(
    target: Target, checkpoint: Checkpoint, adapter: Adapter, tokens: NDArray[np.integer], threads: int
) -> NDArray[np.floating]:
    """Return llama.cpp's logits ``(n, vocab)`` of the checkpoint in float32, with the file's tokenizer."""
    tokenizer = {key: value for key, value in target.gguf.values.items() if key.startswith("tokenizer.")}
    tensors = rope_tensors(checkpoint.model) + merged_tensors(checkpoint, adapter, GgmlType.F32)
    with tempfile.TemporaryDirectory(prefix="irq-verify-") as directory:
        expanded = Path(directory) / "float32.gguf"
        sources = [tensor.source for tensor in tensors]
        write_gguf(expanded, stock_header(checkpoint.model) | tokenizer, sources)
        with LlamaCppRuntime(expanded, None, 1.0, threads, len(tokens)) as plain:
            return plain.logits(tokens)
