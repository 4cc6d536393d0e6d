"""Small models that open: formats/vectors/models/*.gguf and models.json (see make_vectors.py).

Random weights, every codebook and every stock carrier in one file each, and a stock pair whose offsets lie
in its adapter: what fuzzers start from, and what a reader in another language can try itself on. models.json
holds the greedy tokens of the float64 reference and the smallest distance between the two best logits on
the way.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from irq_formats.adapter import LoraLayer, tau_extra_rank
from irq_formats.blocks import BlockSpec, BlockTensor, encode, encode_int8
from irq_formats.gguf import BOOL, F32, STR, U32, GgmlType, TensorSource, write_gguf
from irq_formats.gguf.irq_payload import BlockEntry
from irq_formats.gguf.irq_writer import (
    adapter_header,
    adapter_metadata,
    adapter_sources,
    block_metadata,
    block_sources,
    model_header,
)
from irq_formats.gguf.model_keys import model_metadata
from irq_formats.gguf.repack import carrier, repack
from irq_formats.gguf.stock_blocks import Q2_0, Q4_1, quantize
from irq_formats.model import ModelConfig
from irq_formats.names import tensor_shapes
from irq_runtime.reference import load_model
from scripts.block_vectors import choose_pair

Array = np.ndarray
BASE_HASH = "5e" * 32
PROMPT = (1, 7, 3)
GENERATED = 12  # tokens

CONFIG = ModelConfig(
    family="llama",
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=64,
    vocab_size=40,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SPECS = {
    "blk.0.attn_q": BlockSpec("nf4"),
    "blk.0.attn_k": BlockSpec("nf3", 32, "f16", "f16"),
    "blk.0.attn_v": BlockSpec("nf2", 64, "f32", "f32"),
    "blk.0.attn_output": BlockSpec("int4"),
    "blk.0.ffn_gate": BlockSpec("int3", 64, "f16", "dq8"),
    "blk.0.ffn_up": BlockSpec("int2", 32, "dq8", "none"),
    "blk.0.ffn_down": BlockSpec("nf4", 32, scale_rounding="none"),
}
CARRIERS = {
    "token_embd": GgmlType.Q8_0,
    "blk.0.attn_q": GgmlType.Q4_0,
    "blk.0.attn_k": GgmlType.Q4_1,
    "blk.0.attn_v": GgmlType.F16,
    "blk.0.attn_output": GgmlType.BF16,
    "blk.0.ffn_gate": GgmlType.Q2_0,
    "blk.0.ffn_up": GgmlType.Q4_0,
    "blk.0.ffn_down": GgmlType.Q2_0,
    "output": GgmlType.F16,
}
ADAPTED = ("blk.0.attn_q", "blk.0.ffn_down")
PAIRED = {"blk.0.attn_output": BlockSpec("int4"), "blk.0.ffn_down": BlockSpec("nf4")}
STOCK_HEADER = {"general.architecture": STR("llama"), **model_metadata(CONFIG, "llama")}
LORA_HEADER = {
    "general.architecture": STR("llama"),
    "general.type": STR("adapter"),
    "adapter.type": STR("lora"),
    "adapter.lora.alpha": F32(0.0),
}


def weights() -> dict[str, Array]:
    """Float32 weights by stock name; matrices of two dimensions, norms of one around 1."""
    rng = np.random.default_rng(11)
    return {
        name: (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in tensor_shapes(CONFIG).items()
    }


def layers(rank: int = 3) -> dict[str, LoraLayer]:
    """A random adapter; elastic connections on the first layer only."""
    rng = np.random.default_rng(12)
    return {
        name: LoraLayer(
            (rng.standard_normal((rank, 64)) * 0.2).astype(np.float32),
            (rng.standard_normal((64, rank)) * 0.2).astype(np.float32),
            *((0.25, -0.5) if index == 0 else (0.0, 0.0)),
            scaling=0.5,
        )
        for index, name in enumerate(ADAPTED)
    }


def plain(name: str, array: Array) -> TensorSource:
    return TensorSource(name, array.shape, GgmlType.F32, lambda: array)


def block_tensors(values: dict[str, Array]) -> dict[str, BlockTensor]:
    found = {
        name: encode(values[f"{name}.weight"], *choose_pair(values[f"{name}.weight"], spec), spec)
        for name, spec in SPECS.items()
    }
    return {"token_embd": encode_int8(values["token_embd.weight"]), **found}


def write_irq(directory: Path) -> None:
    values, adapter = weights(), layers()
    blocks = block_tensors(values)
    header = model_header(CONFIG, BASE_HASH) | block_metadata(
        [BlockEntry(name, tensor.spec, tensor.shape) for name, tensor in blocks.items()]
    )
    sources = [
        plain(name, array) for name, array in values.items() if name.removesuffix(".weight") not in blocks
    ]
    for name, tensor in blocks.items():
        sources += block_sources(name, tensor.spec, tensor.shape, tensor.parts.__getitem__)
    adapter_keys = adapter_metadata(adapter, BASE_HASH)
    branches = [source for name, layer in adapter.items() for source in adapter_sources(name, layer)]
    write_gguf(directory / "irq.gguf", header, sources, overwrite=True)
    write_gguf(directory / "irq-adapted.gguf", header | adapter_keys, sources + branches, overwrite=True)
    write_gguf(directory / "irq-adapter.gguf", adapter_header() | adapter_keys, branches, overwrite=True)


def carried(name: str, array: Array, type_: GgmlType) -> TensorSource:
    """A matrix as a stock file stores it; the codes need not be the nearest."""
    if type_ in (GgmlType.Q4_1, GgmlType.Q2_0):
        levels, size = (16, 32) if type_ is GgmlType.Q4_1 else (4, 64)
        blocks = array.reshape(array.shape[0], -1, size)
        low, high = blocks.min(axis=2), blocks.max(axis=2)
        step = ((high - low) / (levels - 1)).astype(np.float16)
        zero = low if type_ is GgmlType.Q4_1 else -step.astype(np.float32)
        codes = np.rint((blocks - zero[..., None]) / step[..., None].astype(np.float32))
        codes = codes.clip(0, levels - 1).astype(np.uint8).reshape(array.shape)
        raw = Q4_1.pack(step, low.astype(np.float16), codes) if levels == 16 else Q2_0.pack(step, codes)
    else:
        raw = quantize(array, type_)
    return TensorSource(name, array.shape, type_, lambda: raw)


def write_stock(directory: Path) -> None:
    sources = []
    for name, array in weights().items():
        type_ = CARRIERS.get(name.removesuffix(".weight"), GgmlType.F32)
        sources.append(carried(name, array, type_))
    write_gguf(directory / "stock.gguf", STOCK_HEADER, sources, overwrite=True)
    pair = {
        f"{name}.weight.lora_{letter}": array
        for name, layer in layers().items()
        for letter, array in (("a", layer.lora_a), ("b", layer.lora_b))
    }
    adapter = [plain(name, array) for name, array in pair.items()]
    header = LORA_HEADER | {"adapter.lora.alpha": F32(1.5)}
    write_gguf(directory / "stock-adapter.gguf", header, adapter, overwrite=True)


def write_pair(directory: Path) -> None:
    """Write a stock pair: what its blocks are worth without their offsets, and these as extra rank."""
    values, adapter = weights(), layers()
    blocks = {
        name: encode(values[f"{name}.weight"], *choose_pair(values[f"{name}.weight"], spec), spec)
        for name, spec in PAIRED.items()
    }
    sources, branches = [], []
    for name, array in values.items():
        tensor = blocks.get(name.removesuffix(".weight"))
        if tensor is None:
            sources.append(carried(name, array, GgmlType.F32 if array.ndim == 1 else GgmlType.Q8_0))
            continue
        type_ = carrier(tensor.spec.codebook, tensor.spec.block_size)
        raw = repack(tensor, type_)
        sources.append(TensorSource(name, array.shape, type_, lambda raw=raw: raw))
        pair = tau_extra_rank(adapter.get(name.removesuffix(".weight")), tensor.tau(), tensor.spec.block_size)
        branches += [plain(f"{name}.lora_{letter}", part) for letter, part in zip("ab", pair, strict=True)]
    names = STR.array(list(blocks))
    base = {
        "irq.base_hash": STR(BASE_HASH),
        "irq.stock.name": names,
        "irq.stock.tau": BOOL.array([True] * len(blocks)),
    }
    extra = {
        "irq.adapter.base_hash": STR(BASE_HASH),
        "irq.stock.name": names,
        "irq.stock.tau_rank": U32.array([64 // tensor.spec.block_size for tensor in blocks.values()]),
    }
    write_gguf(directory / "pair-base.gguf", STOCK_HEADER | base, sources, overwrite=True)
    write_gguf(directory / "pair-adapter.gguf", LORA_HEADER | extra, branches, overwrite=True)


def greedy(model: Path, adapter: Path | None) -> dict[str, object]:
    """The tokens after PROMPT, and how near the second best ever came."""
    reference = load_model(model, adapter)
    cache, step, tokens, margin = reference.new_cache(), list(PROMPT), [], np.inf
    for _ in range(GENERATED):
        logits = reference.step(step, cache)[-1]
        second, first = np.sort(logits)[-2:]
        margin = min(margin, first - second)
        step = [int(logits.argmax())]
        tokens += step
    return {
        "model": model.name,
        "adapter": None if adapter is None else adapter.name,
        "prompt": PROMPT,
        "greedy": tokens,
        "margin": round(float(margin), 4),
    }


def write_models(directory: Path) -> int:
    """Write every model; return how many pairs of model and adapter there are."""
    directory.mkdir(parents=True, exist_ok=True)
    write_irq(directory)
    write_stock(directory)
    write_pair(directory)
    pairs = [
        ("irq", None),
        ("irq-adapted", None),
        ("irq", "irq-adapter"),
        ("stock", None),
        ("stock", "stock-adapter"),
        ("pair-base", "pair-adapter"),
    ]
    entries = [
        greedy(directory / f"{model}.gguf", None if adapter is None else directory / f"{adapter}.gguf")
        for model, adapter in pairs
    ]
    (directory / "models.json").write_text(json.dumps(entries, indent=1) + "\n")
    return len(entries)
