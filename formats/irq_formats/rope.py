"""Rotary frequencies, in the float32 arithmetic of transformers.

Transformers computes frequencies, angles, cosines and sines in float32 whatever the dtype of the
model, also of a float64 one. At position 500 one unit in the last place of a frequency turns an angle
by 3e-5, so float32 results are part of what the model *is*; they are reproduced here, not refined::

    e[i]     = fl32(2 i / d)                           i = 0 .. d/2 - 1, d = head_dim
    f[i]     = fl32(1 / fl32(theta ** e[i]))           the power correctly rounded
    linear   f[i] = fl32(f[i] / factor)
    llama3   see _llama3

With float64 angles the logits of SmolLM2-135M over 512 positions would differ by an NMSE of 9e-13, ten
times all other differences together. torch's float32 power is not always the nearest float32: over
the usual theta and d, at most one of the d/2 frequencies differs, by one unit in the last place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irq_formats.model import ModelConfig, RopeScaling

__all__ = ["inverse_frequencies", "rope_factors"]

F32 = NDArray[np.float32]


def _base_frequencies(config: ModelConfig) -> F32:
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(np.float64(np.float32(config.rope_theta)), exponent.astype(np.float64))
    return np.float32(1) / power.astype(np.float32)


def _llama3(base: F32, scaling: RopeScaling) -> F32:
    """Llama 3.1: long waves are slowed down by ``factor``, short ones kept, a ramp between."""
    f32 = np.float32
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = f32(2 * np.pi) / base  # positions per turn
    slowed = np.where(wavelength > f32(context / low), base / f32(scaling.factor), base)
    ramp = (f32(context) / wavelength - f32(low)) / f32(high - low)
    between = (f32(1) - ramp) * slowed / f32(scaling.factor) + ramp * slowed
    inside = (wavelength >= f32(context / high)) & (wavelength <= f32(context / low))
    return np.where(inside, between, slowed)


def inverse_frequencies(config: ModelConfig) -> F32:
    """Return the angle per position of every rotated pair, float32 ``(head_dim / 2,)``, radians."""
    base = _base_frequencies(config)
    scaling = config.rope_scaling
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return base / np.float32(scaling.factor)
    return _llama3(base, scaling)


def rope_factors(config: ModelConfig) -> F32 | None:
    """Return what a stock file holds as ``rope_freqs.weight``, or None where it needs none.

    Stock runtimes divide the unscaled frequency of each pair by its factor, float32
    ``(head_dim / 2,)``. Linear scaling travels as metadata instead.
    """
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    return _base_frequencies(config) / inverse_frequencies(config)
