"""Keys and values of the positions computed so far."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["KVCache"]

FloatArray = NDArray[np.floating]


class KVCache:
    """Keys and values of all layers; storage doubles when it is full.

    Attributes:
        dtype: float64 or float32.
        length: Positions held.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        # [key or value, layer, head, position, element]
        self._store: FloatArray = np.empty((2, layers, kv_heads, 0, head_dim), self.dtype)

    def append(self, layer: int, k: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Store the new positions of one layer and return all of its keys and values.

        Args:
            layer: Layer index.
            k: ``(n, kv_heads, head_dim)``.
            v: ``(n, kv_heads, head_dim)``.

        Returns:
            Keys and values ``(kv_heads, length + n, head_dim)``, views of the cache.
        """
        end = self.length + k.shape[0]
        self._reserve(end)
        self._store[0, layer, :, self.length : end] = k.transpose(1, 0, 2)
        self._store[1, layer, :, self.length : end] = v.transpose(1, 0, 2)
        return self._store[0, layer, :, :end], self._store[1, layer, :, :end]

    def advance(self, count: int) -> None:
        """Count positions that every layer has stored."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        self.length = min(self.length, length)

    def _reserve(self, positions: int) -> None:
        capacity = self._store.shape[3]
        if positions <= capacity:
            return
        shape = list(self._store.shape)
        shape[3] = max(positions, 2 * capacity)
        grown: FloatArray = np.empty(shape, self.dtype)
        grown[:, :, :, : self.length] = self._store[:, :, :, : self.length]
        self._store = grown
