"""The engine on every instruction set of this machine: products, norms, attention and the cache together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from instruction_sets import BYTES
from model_cases import nmse
from tiny_files import block_tensors, write_irq
from tiny_models import tiny_model, tiny_tokens
from tolerance import NMSE_FAST_TINY, NMSE_FLOAT32, NMSE_HALF_CACHE

from irq_formats.adapter import random_layer
from irq_formats.blocks import BlockSpec
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model

SPLIT = 100  # tokens of the prompt; the others come one by one


SHAPES = {
    "llama": {},
    "qwen3": {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 20},  # no whole vectors
}


@pytest.fixture(scope="module", params=SHAPES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int], np.ndarray]:
    """A file in nf4 with an adapter, a text, and the reference's logits after each of its tokens."""
    model = tiny_model(request.param, **SHAPES[request.param])
    blocks = block_tensors(model, BlockSpec("nf4"))
    rng = np.random.default_rng(1)
    adapter = {
        module: random_layer(tensor.shape, float(np.linalg.norm(tensor.dequantize())), rng, rank=8)
        for module, tensor in blocks.items()
    }
    path = tmp_path_factory.mktemp("isa") / "m.gguf"
    write_irq(path, model, blocks, adapter)
    tokens = tiny_tokens(model, SPLIT + 20)[0].tolist()
    return path, tokens, load_model(path).logits(tokens)


def logits(engine: Engine, tokens: list[int]) -> np.ndarray:
    """A prompt at once, then token by token: float32 (n, vocab)."""
    cache = engine.new_cache()
    parts = [engine.step(tokens[:SPLIT], cache)]
    return np.concatenate([*parts, *(engine.step([token], cache) for token in tokens[SPLIT:])])


def test_exact(isa: str, case: tuple[Path, list[int], np.ndarray]) -> None:
    path, tokens, expected = case
    engine = Engine(path)
    assert engine.info.isa == isa
    assert nmse(logits(engine, tokens), expected) < NMSE_FLOAT32


def test_half_cache(isa: str, case: tuple[Path, list[int], np.ndarray]) -> None:
    path, tokens, expected = case
    assert NMSE_FLOAT32 < nmse(logits(Engine(path, half_cache=True), tokens), expected) < NMSE_HALF_CACHE


def test_fast(isa: str, case: tuple[Path, list[int], np.ndarray]) -> None:
    path, tokens, expected = case
    error = nmse(logits(Engine(path, mode="fast"), tokens), expected)
    assert NMSE_FLOAT32 < error < NMSE_FAST_TINY["bytes" if isa in BYTES else "words"]
