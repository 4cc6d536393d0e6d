"""Rotary position embedding: turn pairs of a head by an angle that grows with the position.

Angles, cosines and sines are float32 whatever the dtype of the model (see :mod:`irq_formats.rope`);
the products are taken in the dtype of the features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["rotate", "rotation"]

F32 = NDArray[np.float32]
FloatArray = NDArray[np.floating]


def rotation(frequencies: F32, start: int, count: int) -> tuple[F32, F32]:
    """Return cosines and sines, float32 ``(count, head_dim / 2)`` each.

    Args:
        frequencies: float32 ``(head_dim / 2,)``, radians per position.
        start: First position.
        count: Number of positions.

    The angle is ``fl32(position * frequency)``; its cosine and sine are rounded once, from float64.
    """
    positions = np.arange(start, start + count, dtype=np.float32)
    angles = (positions[:, None] * frequencies).astype(np.float64)  # exact float32 products
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: FloatArray, cos: F32, sin: F32, style: str) -> FloatArray:
    """Rotate every pair of every head.

    Args:
        x: ``(n, heads, head_dim)``.
        cos: float32 ``(n, head_dim / 2)``.
        sin: float32 ``(n, head_dim / 2)``.
        style: ``half`` pairs element i with i + head_dim/2; ``interleaved`` pairs 2i with 2i + 1.

    Returns:
        ``(n, heads, head_dim)``, dtype of ``x``.
    """
    c, s = cos.astype(x.dtype)[:, None], sin.astype(x.dtype)[:, None]  # (n, 1, head_dim / 2)
    half = x.shape[-1] // 2
    if style == "half":
        first, second = slice(None, half), slice(half, None)
    else:
        first, second = slice(0, None, 2), slice(1, None, 2)
    rotated = np.empty_like(x)
    rotated[..., first] = x[..., first] * c - x[..., second] * s
    rotated[..., second] = x[..., second] * c + x[..., first] * s
    return rotated
