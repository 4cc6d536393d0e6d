"""``scripts/get_smollm2.py`` makes config and tokenizer of what a GGUF says, with nothing else at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def test_config_and_tokenizer_are_the_models_own(shared_data: Path) -> None:
    from get_smollm2 import model_config, tokenizer_files

    original = shared_data / "models" / "smollm2-135m-instruct"
    expected = {
        name: json.loads((original / name).read_text("utf-8"))
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    config, tokenizer = expected["config.json"], expected["tokenizer.json"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    metadata = {
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(config["rms_norm_eps"])),
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.tokens": list(tokenizer["model"]["vocab"]),
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(config["vocab_size"])],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": expected["tokenizer_config.json"]["chat_template"],
    }
    found = model_config(metadata)
    assert found == {key: config[key] for key in found} | {"torch_dtype": "float32"}
    files = tokenizer_files(metadata)
    assert files == {name: expected[name] for name in files}
