"""Tiny random models of every supported family, built in well under a second."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

__all__ = ["save_tiny_model", "tiny_model", "tiny_tokens"]

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

#: Every linear's input is a multiple of 64, intermediate / 64 is odd, the vocabulary is no round number.
_SHAPE = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def tiny_model(
    family: str = "llama",
    *,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: object,
) -> PreTrainedModel:
    """Return a random causal language model in evaluation mode.

    Args:
        family: "llama", "mistral", "qwen2" or "qwen3".
        tied: Whether head and embedding share one matrix.
        seed: Same seed, same weights; the caller's random state is left alone.
        dtype: Of the parameters.
        **overrides: Fields of the Hugging Face configuration.
    """
    config_class, model_class = _FAMILIES[family]
    settings = {**_SHAPE, "tie_word_embeddings": tied, "attn_implementation": "eager", **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):  # ones hide a forgotten norm
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):  # zeros hide a forgotten bias
                    parameter.normal_(std=0.1)
                else:  # larger than HF's 0.02, so that attention is not uniform
                    parameter.normal_(std=0.08)
    return model.to(dtype).eval()


def save_tiny_model(directory: Path, family: str = "llama", **options: object) -> PreTrainedModel:
    """Build a model, write it as a Hugging Face directory (no tokenizer) and return it."""
    model = tiny_model(family, **options)
    model.save_pretrained(directory)
    return model


def tiny_tokens(model: PreTrainedModel, n: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Return random token ids, (1, n)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, n), generator=generator)
