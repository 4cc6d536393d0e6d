"""Triton kernels for NVIDIA GPUs: the ICQ search and the decoding of block-quantised weights.

The torch code in :mod:`irq_export.icq_search` and :mod:`irq_export.block_linear` is their specification:
equal bits, tested. The kernels are used where a tensor is on CUDA and Triton can be imported; setting
``IRQ_EXPORT_NO_TRITON=1`` switches them off.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

__all__ = ["available"]


@cache
def _enabled() -> bool:
    return os.environ.get("IRQ_EXPORT_NO_TRITON", "") in ("", "0") and (
        torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
    )


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    return device.type == "cuda" and _enabled()
