"""Rotary keys of stock files mean what they mean to llama.cpp, in both runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_cases import nmse
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer
from tolerance import NMSE_FLOAT32

from irq_export.export.gguf import to_gguf
from irq_export.parity.metrics import log_softmax
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.gguf import F32, STR, GgufValue, TensorSource, open_gguf, write_gguf
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model

TOKENS = list(range(20, 60))
FACTOR, OLD_NAME, KIND, ATTENTION = (
    f"llama.rope.{key}" for key in ("scaling.factor", "scale_linear", "scaling.type", "scaling.attn_factor")
)
#: Keys of a file and the factor by which they slow the rotation down.
CASES: dict[str, tuple[dict[str, GgufValue], float]] = {
    "old name": ({OLD_NAME: F32(8.0)}, 8.0),
    "both names": ({OLD_NAME: F32(8.0), FACTOR: F32(2.0)}, 2.0),
    "old name, zero": ({OLD_NAME: F32(0.0)}, 1.0),
    "zero": ({FACTOR: F32(0.0), OLD_NAME: F32(8.0)}, 1.0),
    "none": ({OLD_NAME: F32(8.0), KIND: STR("none")}, 1.0),
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock llama in F32 with a tokenizer."""
    work = tmp_path_factory.mktemp("rope")
    write_tiny_checkpoint(work / "checkpoint", vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(work / "checkpoint", "gpt-2")
    to_gguf(work / "checkpoint", work / "m.gguf", merge="f32")
    return work / "m.gguf"


def with_keys(source: Path, target: Path, keys: dict[str, GgufValue]) -> Path:
    gguf = open_gguf(source)
    tensors = [
        TensorSource(t.name, t.shape, t.type, lambda name=t.name: gguf.read(name))
        for t in gguf.tensors.values()
    ]
    write_gguf(target, {**gguf.values, **keys}, tensors)
    return target


@pytest.mark.parametrize(("keys", "factor"), CASES.values(), ids=CASES.keys())
def test_scale(keys: dict[str, GgufValue], factor: float, merged: Path, tmp_path: Path) -> None:
    file = with_keys(merged, tmp_path / "m.gguf", keys)
    plain = load_model(merged)
    model = load_model(file)
    assert np.array_equal(model.weights.frequencies, plain.weights.frequencies / np.float32(factor))
    expected = model.logits(TOKENS)
    assert nmse(Engine(file).logits(TOKENS), expected) < NMSE_FLOAT32
    assert (nmse(plain.logits(TOKENS), expected) > 1e-3) == (factor != 1)


@pytest.mark.parametrize("keys", [keys for keys, _ in CASES.values()], ids=CASES.keys())
def test_llamacpp_agrees(keys: dict[str, GgufValue], merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from irq_export.parity.llamacpp import LlamaCpp

    file = with_keys(merged, tmp_path / "m.gguf", keys)
    with LlamaCpp(file, None, ctx=64) as server:
        theirs = server.logprobs(TOKENS)
    assert nmse(log_softmax(load_model(file).logits(TOKENS)), theirs) < NMSE_FLOAT32


@pytest.mark.parametrize("opener", [load_model, Engine], ids=["reference", "native"])
def test_what_is_not_computed_is_refused(
    opener: Callable[[Path], object], merged: Path, tmp_path: Path
) -> None:
    """llama.cpp multiplies queries and keys by attn_factor."""
    with pytest.raises(UnsupportedModel, match="attn_factor"):
        opener(with_keys(merged, tmp_path / "2.gguf", {ATTENTION: F32(2.0)}))
    opener(with_keys(merged, tmp_path / "1.gguf", {ATTENTION: F32(1.0)}))
    with pytest.raises(MalformedFile, match="factor"):
        opener(with_keys(merged, tmp_path / "negative.gguf", {OLD_NAME: F32(-2.0)}))
