"""The model description: what is read, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_cases import LLAMA3

from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.gguf.model_keys import IRQ_PREFIX, model_metadata, read_model
from irq_formats.model import ModelConfig, RopeScaling
from irq_formats.rope import inverse_frequencies, rope_factors
from tests.tiny_models import tiny_model

HF: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}


def plain(config: ModelConfig, prefix: str) -> dict[str, object]:
    return {key: value.value for key, value in model_metadata(config, prefix).items()}


class TestFromHf:
    def test_fields(self) -> None:
        config = ModelConfig.from_hf(HF)
        assert config == ModelConfig("llama", 128, 2, 4, 2, 32, 192, 259, 256, 1e-5, 500000.0)
        assert config.group_size == 2

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    def test_configs_of_transformers_5(self, family: str, tmp_path: Path) -> None:
        model = tiny_model(family, **({"sliding_window": None} if family == "mistral" else {}))
        model.config.save_pretrained(tmp_path)
        config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
        assert (config.family, config.head_dim, config.rope_theta) == (family, 32, 10000.0)
        assert config.qkv_bias == (family == "qwen2")
        assert config.qk_norm == (family == "qwen3")
        assert config.architecture == ("llama" if family == "mistral" else family)

    def test_both_styles_of_rope(self) -> None:
        old = ModelConfig.from_hf({**HF, "rope_scaling": LLAMA3})
        new = {key: value for key, value in HF.items() if key != "rope_theta"}
        rope = {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
        assert ModelConfig.from_hf({**new, **rope}) == old
        assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
        linear = ModelConfig.from_hf({**HF, "rope_scaling": {"type": "linear", "factor": 2.0}})
        assert linear.rope_scaling == RopeScaling("linear", 2.0)
        assert ModelConfig.from_hf({**HF, "rope_scaling": {"rope_type": "default"}}) == (
            ModelConfig.from_hf(HF)
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"model_type": "gpt2"},
            {"hidden_act": "gelu"},
            {"attention_bias": True},
            {"mlp_bias": True},
            {"model_type": "mistral", "sliding_window": 64},
            {"model_type": "mistral", "max_position_embeddings": 32768},
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True},
            {"partial_rotary_factor": 0.5},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        ],
        ids=lambda change: "-".join(map(str, change)),
    )
    def test_what_we_cannot_compute_is_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(UnsupportedModel) as error:
            ModelConfig.from_hf({**HF, **change})
        assert error.value.hint

    @pytest.mark.parametrize(
        "change",
        [
            {"model_type": "mistral", "sliding_window": None},
            {"model_type": "mistral", "sliding_window": 256},
            {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": None},
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False},
            {"attention_dropout": 0.1},
            {"attention_bias": False},
        ],
        ids=lambda change: "-".join(map(str, change)),
    )
    def test_what_does_not_matter_is_accepted(self, change: dict[str, object]) -> None:
        ModelConfig.from_hf({**HF, **change})

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": None},
            {"hidden_size": "128"},
            {"hidden_size": 128.0},
            {"hidden_size": True},
            {"hidden_size": -128},
            {"num_hidden_layers": 10**6},
            {"num_hidden_layers": 0},
            {"num_attention_heads": 0},
            {"num_attention_heads": 10**30},
            {"num_key_value_heads": 3},
            {"num_key_value_heads": 0},
            {"head_dim": 31},
            {"vocab_size": 0},
            {"rms_norm_eps": float("nan")},
            {"rms_norm_eps": 0},
            {"rms_norm_eps": "1e-5"},
            {"rope_theta": float("inf")},
            {"rope_theta": 0.5},
            {"tie_word_embeddings": 1},
            {"rope_scaling": "linear"},
            {"rope_scaling": {"type": "linear"}},
            {"rope_scaling": {"type": "linear", "factor": 0}},
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            {"rope_parameters": {"rope_theta": 1e6}},
        ],
        ids=str,
    )
    def test_malformed(self, change: dict[str, object]) -> None:
        with pytest.raises(MalformedFile):
            ModelConfig.from_hf({**HF, **change})


class TestGguf:
    @pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "linear", "factor": 3.7}])
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
    def test_irq_keys_give_back_the_same_object(self, family: str, scaling: object) -> None:
        config = ModelConfig.from_hf({**HF, "model_type": family, "rope_scaling": scaling})
        assert read_model(plain(config, IRQ_PREFIX), IRQ_PREFIX) == config

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    def test_stock_keys(self, family: str) -> None:
        config = ModelConfig.from_hf({**HF, "model_type": family})
        tensors = {"output.weight"}
        tensors |= {"blk.0.attn_q.bias"} if config.qkv_bias else set()
        tensors |= {"blk.0.attn_q_norm.weight"} if config.qk_norm else set()
        got = read_model(plain(config, family), family, tensors)
        style = "interleaved" if family == "llama" else "half"
        eps = float(np.float32(config.rms_norm_eps))
        assert got == dataclasses.replace(config, rope_style=style, rms_norm_eps=eps)
        tied = read_model(plain(config, family), family, tensors - {"output.weight"})
        assert tied.tie_word_embeddings

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("block_count", None),
            ("block_count", "2"),
            ("block_count", 10**6),
            ("attention.head_count", 0),
            ("attention.head_count", 10**9),
            ("attention.head_count_kv", 3),
            ("rope.dimension_count", 16),
            ("attention.value_length", 16),
            ("attention.key_length", 31),
            ("attention.layer_norm_rms_epsilon", None),
            ("attention.layer_norm_rms_epsilon", float("nan")),
            ("vocab_size", 7),
        ],
    )
    def test_malformed_stock_keys(self, key: str, value: object) -> None:
        metadata = plain(ModelConfig.from_hf(HF), "llama")
        metadata["tokenizer.ggml.tokens"] = ["x"] * 259
        read_model(metadata, "llama")
        metadata[f"llama.{key}"] = value
        if key == "attention.key_length":  # the rotary dimension is odd, and all agree on it
            metadata |= {"llama.attention.value_length": value, "llama.rope.dimension_count": value}
        with pytest.raises(MalformedFile):
            read_model(metadata, "llama")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_size", None),
            ("num_hidden_layers", 10**6),
            ("rope_style", "whole"),
            ("tie_word_embeddings", 1),
            ("rope_scaling.kind", "llama3"),
        ],
    )
    def test_malformed_irq_keys(self, key: str, value: object) -> None:
        metadata = plain(ModelConfig.from_hf(HF), IRQ_PREFIX)
        metadata[f"{IRQ_PREFIX}.{key}"] = value
        with pytest.raises(MalformedFile):
            read_model(metadata, IRQ_PREFIX)

    def test_other_architectures_are_refused(self) -> None:
        for arch in ("gpt2", "qwen3moe", ""):
            with pytest.raises(UnsupportedModel):
                read_model({}, arch)


class TestFrequencies:
    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "default", "rope_theta": 10000.0},
            {"rope_type": "default", "rope_theta": 100000.0},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
            {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192},
        ],
        ids=lambda rope: f"{rope['rope_type']}-{rope['rope_theta']}",
    )
    def test_bit_equal_to_transformers(self, rope: dict[str, object]) -> None:
        model = tiny_model(head_dim=64, rope_parameters=rope)
        config = ModelConfig.from_hf(model.config.to_dict())
        assert np.array_equal(inverse_frequencies(config), model.model.rotary_emb.inv_freq.numpy())

    def test_factors_are_for_llama3_only(self) -> None:
        assert rope_factors(ModelConfig.from_hf(HF)) is None
        factors = rope_factors(ModelConfig.from_hf({**HF, "rope_scaling": LLAMA3}))
        assert factors is not None
        assert factors.shape == (16,)
        assert factors.min() == 1
        assert factors.max() == 8
        assert (np.diff(factors) >= 0).all()
