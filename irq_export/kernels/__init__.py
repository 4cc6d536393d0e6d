"""Triton kernels for NVIDIA GPUs: ICQ search, decoding of block-quantised weights, the elastic connection.

The torch code in :mod:`irq_export.icq_search`, :mod:`irq_export.block_linear` and :mod:`irq_export.elastic`
is their specification: equal bits, tested (but for the order of one sum, the gradient of a beta). The kernels
are used where a tensor is on CUDA and Triton can be imported; ``IRQ_EXPORT_NO_TRITON=1`` switches them off.
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


@cache
def _supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # what Triton supports, and bf16


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    return device.type == "cuda" and _enabled() and _supported(device)
