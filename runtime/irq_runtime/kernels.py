"""Weights for the native kernels, one at a time: for tests, benchmarks and a look inside.

The engine maps its file and never comes through here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irq_formats.blocks import BlockTensor
from irq_formats.gguf.types import GgmlType
from irq_runtime import _native

__all__ = ["block_weight", "stock_weight"]


def block_weight(tensor: BlockTensor) -> _native.Weight:
    """Return a kernel view of a block-quantised tensor; it keeps the arrays alive."""
    spec, parts = tensor.spec, tensor.parts
    codes = np.ascontiguousarray(parts["codes"]).view(np.uint8)
    weight = _native.Weight("blocks", spec.codebook, spec.block_size, tensor.shape[1], codes)
    for tau, name, storage in ((False, "scale", spec.scale), (True, "tau", spec.tau)):
        if storage == "none":
            continue
        is_dq8_scale = storage == "dq8" and not tau
        weight.set_values(
            tau,
            storage,
            np.ascontiguousarray(parts[name]).reshape(-1).view(np.uint8),
            parts[f"{name}_absmax"] if storage == "dq8" else None,
            float(parts["scale_offset"][0]) if is_dq8_scale else 0.0,
            is_dq8_scale and spec.scale_rounding == "fp16",
        )
    return weight


def stock_weight(raw: NDArray[np.generic], type_: GgmlType, columns: int) -> _native.Weight:
    """Return a kernel view of a matrix in one of ggml's formats.

    Args:
        raw: ``(out, ...)``: values, or uint8 blocks ``(out, row_bytes)``.
        type_: F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
        columns: in.
    """
    block_size = 1 if type_ in (GgmlType.F32, GgmlType.F16, GgmlType.BF16) else 32
    rows = np.ascontiguousarray(raw).view(np.uint8).reshape(raw.shape[0], -1)
    return _native.Weight(type_.name.lower(), "", block_size, columns, rows)
