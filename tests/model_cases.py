"""Models on which one runtime is held to another: every family, every option that changes the arithmetic."""

from __future__ import annotations

import numpy as np

__all__ = ["LLAMA3", "MODELS", "nmse"]

#: Llama 3.1's scaling, for short contexts. transformers 5 wants ``rope_theta`` beside it.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

#: Name: family and options of tests.tiny_models.tiny_model; fixture ``model`` goes through them.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "head_dim 20": ("llama", {"head_dim": 20}),
    "head_dim 64": ("llama", {"head_dim": 64}),
    "llama3 scaling": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    "linear scaling": ("llama", {"rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """Mean square of the difference over the variance of what is expected."""
    return float(np.mean((got - expected) ** 2) / np.var(expected))
