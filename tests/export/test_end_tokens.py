"""Every token that ends a reply in transformers ends it in each export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer

from irq_export.export.gguf import to_gguf
from irq_export.export.onnx.genai import genai_config
from irq_export.export.onnx.options import OnnxOptions
from irq_export.parity.verify import verify
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile
from irq_formats.gguf import U32, TensorSource, open_gguf, write_gguf
from irq_formats.hf_tokenizer import END_TOKENS_KEY
from irq_runtime.tokenizer import load_tokenizer


def checkpoint(path: Path, generation: dict[str, Any] | None = None, **config: object) -> Path:
    """A checkpoint whose tokenizer ends with </s>, which is token 1, and pads with token 2."""
    write_tiny_checkpoint(path, vocab_size=VOCAB_SIZE, **config)
    save_tiny_tokenizer(path)
    settings = path / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "eos_token": "</s>", "pad_token": "<|im_start|>"})
    )
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, [1]),
        (None, {"eos_token_id": 3}, [1, 3]),
        (None, {"eos_token_id": [5, 1, 3]}, [1, 5, 3]),
        ({"eos_token_id": None}, {"eos_token_id": [5, 1, 3]}, [1, 5, 3]),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 3]}, [1, 5]),
        ({"eos_token_id": [3, 5, 7, 2, 3, 100000]}, {}, [1, 3, 5, 7, 2]),
    ],
)
def test_no_end_token_is_lost(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, object], expected: list[int]
) -> None:
    source = checkpoint(tmp_path / "c", generation, **config)
    to_gguf(source, tmp_path / "m.gguf")
    model = open_gguf(tmp_path / "m.gguf")
    assert load_tokenizer(model).stop_tokens == tuple(expected)
    assert (END_TOKENS_KEY in model.metadata) == (len(expected) > 3)
    assert set(load_tokenizer(model, source).stop_tokens) == set(expected)  # as --tokenizer
    if "100000" not in json.dumps(generation):  # which to-onnx refuses
        stops = genai_config(open_checkpoint(source), OnnxOptions())["model"]["eos_token_id"]
        assert set(stops) == set(expected)
    report = verify(tmp_path / "m.gguf", against=source, runtimes=["native"], positions=8, greedy=0)
    assert report.passed, report.to_text()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (
            {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": -1},
            (1, None),
        ),  # LLaMA's first conversions
        ({"pad_token_id": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE, "eos_token_id": 3}, (3, None)),
        ({"pad_token_id": 2, "bos_token_id": 5}, (2, 5)),
    ],
)
def test_genai_pads_with_a_token_that_there_is(
    tmp_path: Path, ids: dict[str, int], expected: tuple[int, int | None]
) -> None:
    model = genai_config(open_checkpoint(checkpoint(tmp_path / "c", **ids)), OnnxOptions())["model"]
    assert (model["pad_token_id"], model.get("bos_token_id")) == expected


@pytest.mark.parametrize("end", [VOCAB_SIZE, "2", True])
def test_genai_is_given_no_end_that_there_is_not(tmp_path: Path, end: object) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "c", {"eos_token_id": end}))
    with pytest.raises(MalformedFile, match=r"eos_token_id: (not a token id|a token id outside)"):
        genai_config(source, OnnxOptions())


def test_ends_that_stock_keys_cannot_hold_are_noted(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", {"eos_token_id": [3, 5, 7, 8]})
    result = to_gguf(source, tmp_path / "pair", profile="stock")
    assert any("may not stop at [7, 8]" in note for note in result.notes)
    assert load_tokenizer(open_gguf(tmp_path / "pair" / "base.gguf")).stop_tokens == (1, 3, 5, 7, 8)


def test_an_end_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    to_gguf(checkpoint(tmp_path / "c"), tmp_path / "m.gguf")
    model = open_gguf(tmp_path / "m.gguf")
    values = {**model.values, END_TOKENS_KEY: U32.array([1, 10**6])}
    sources = [
        TensorSource(t.name, t.shape, t.type, lambda name=t.name: model.read(name))
        for t in model.tensors.values()
    ]
    write_gguf(tmp_path / "bad.gguf", values, sources)
    with pytest.raises(MalformedFile, match="outside the vocabulary"):
        load_tokenizer(open_gguf(tmp_path / "bad.gguf"))
