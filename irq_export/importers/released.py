"""Adapters of the released IR-QLoRA code, whose quantised base has to be searched again.

The released code (github.com/htqin/IR-QLoRA) saves A, B and the betas (``lora_default_A_scale``,
``lora_default_B_scale``); codes, scales and offsets are recomputed from the floating-point model at every
load. ``numerics="reference"`` repeats that arithmetic. What it cannot know: the training grid is the
default of the training script (n = 100; the evaluation script says 125), and CUDA may add in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from irq_export.quantize_model import QuantizeReport, quantize

__all__ = ["NEVER_STORED", "search_again"]

#: What the user is told.
NEVER_STORED = (
    "the released code never stored the quantised base of this adapter: codes, scales and offsets were "
    "searched again with its arithmetic and the grid of its training script (tau_range 0.1, tau_n 100); "
    "that is the base it was trained on only if the floating-point model, the grid and the dtype are the same"
)


def search_again(
    model_dir: Path,
    directory: Path,
    *,
    device: str,
    progress: Callable[[int, int, str], None] | None,
) -> QuantizeReport:
    """Quantise as the released code does at every load, into an empty directory."""
    return quantize(
        model_dir,
        directory,
        icq=True,
        tie="first",
        refine="none",
        numerics="reference",
        scale_rounding="none",
        device=device,
        overwrite=True,
        progress=progress,
    )
