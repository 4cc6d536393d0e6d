"""Tiny random quantised checkpoints, without torch and without a search."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from irq_formats.blocks import BlockSpec, BlockTensor, encode, encode_int8
from irq_formats.checkpoint import hf_tensor_shapes
from irq_formats.checkpoint_writer import SHARD_BYTES, checkpoint_writer
from irq_formats.model import ModelConfig
from irq_formats.names import linear_names
from irq_formats.safetensors_io import TensorSpec

__all__ = ["TINY_CONFIG", "random_block_tensor", "write_tiny_checkpoint"]

TINY_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def random_block_tensor(spec: BlockSpec, shape: tuple[int, int], seed: int = 0) -> BlockTensor:
    """A tensor of normal weights whose blocks have different scales and offsets."""
    rng = np.random.default_rng(seed)
    weight = (0.08 * rng.standard_normal(shape)).astype(np.float32)
    if spec.codebook == "int8":
        return encode_int8(weight)
    blocks = weight.reshape(shape[0], -1, spec.block_size)
    tau = np.median(blocks, axis=2).astype(np.float32)
    scale = np.abs(blocks - tau[..., None]).max(axis=2)
    if spec.codebook.startswith("int"):
        scale /= np.float32((2**spec.bits - 1) / 2)
    return encode(weight, scale, tau, spec)


def write_tiny_checkpoint(
    path: Path,
    spec: BlockSpec | None = None,
    *,
    embedding: bool = False,
    tied: bool = False,
    shard_bytes: int = SHARD_BYTES,
    **overrides: object,
) -> dict[str, BlockTensor]:
    """Write a checkpoint and return its block tensors by module name.

    Args:
        path: The directory.
        spec: Of the linears; nf4 by default.
        embedding: Whether the embedding (and an untied head) is int8.
        tied: Whether the head is tied.
        shard_bytes: As of the writer.
        **overrides: Fields of the configuration.
    """
    spec = spec or BlockSpec()
    config = {**TINY_CONFIG, "tie_word_embeddings": tied, **overrides}
    model = ModelConfig.from_hf(config)
    specs = dict.fromkeys(linear_names(model), spec)
    if embedding:
        int8 = BlockSpec("int8", 32, "f16", "none")
        specs |= {"model.embed_tokens": int8} | ({} if tied else {"lm_head": int8})
    rng = np.random.default_rng(1)
    tensors = {}
    with checkpoint_writer(path, shard_bytes=shard_bytes) as writer:
        for seed, (name, shape) in enumerate(hf_tensor_shapes(model).items()):
            module = name.removesuffix(".weight")
            if module in specs and name.endswith(".weight"):
                tensors[module] = random_block_tensor(specs[module], (shape[0], shape[1]), seed)
                writer.add_block(module, tensors[module])
                continue
            array = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            if len(shape) == 2:
                array = (array - np.float32(1)) / np.float32(8)
            writer.add_plain(TensorSpec(name, "F32", shape), partial(np.copy, array))
        writer.finish(config, spec=spec, skipped={}, search={"icq": False})
    return tensors
