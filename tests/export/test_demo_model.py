"""The model inside the package: what the README, the demo and other tests rely on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

PROMPT = "Once upon a time"
CONTINUATION = (
    " a young girl named Rose lived in a little town at the foot of a mountain with her grandfather."
)
# Frances Hodgson Burnett, The Land of the Blue Flower (public domain): one of the held-out books.
UNSEEN = (
    "The Land of the Blue Flower was not called by that name until the tall, strong, beautiful King Amor "
    "came down from his castle on the mountain crag and began to reign. Before that time it was called "
    "King Mordreth's Land, and as the first King Mordreth had been a fierce and cruel king this seemed a "
    "gloomy name."
)


@pytest.fixture(scope="module")
def directory(repo: Path) -> Path:
    return repo / "irq_export" / "demo_model"


@pytest.fixture(scope="module")
def model(directory: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def test_directory_is_small_and_complete(directory: Path) -> None:
    files = {path.name for path in directory.iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (directory / "model.safetensors").stat().st_size <= 6_000_000


def test_shape(model: LlamaForCausalLM) -> None:
    config = model.config
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert config.vocab_size == 1024
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * config.num_hidden_layers + 1
    assert all(linear.in_features % 64 == 0 for linear in linears)


def test_weights_are_fp16_as_stored(model: LlamaForCausalLM) -> None:
    assert all(torch.equal(p, p.half().float()) and p.isfinite().all() for p in model.parameters())


def test_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    text = 'Naïve "quotes",\n\n  spaces and 123 numbers: it\'s ☃.'
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 1024
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[1:]) == text
    described = json.loads((directory / "tokenizer.json").read_text("utf-8"))["pre_tokenizer"]
    assert described["type"] == "ByteLevel"  # llama.cpp's "gpt-2"
    assert described["use_regex"] is True
    assert described["add_prefix_space"] is False


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Tell on."}, {"role": "assistant", "content": "No."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|bos|>Tell on.\nNo.<|eos|>"


def test_greedy_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]  # (1, prompt)
    with torch.inference_mode():
        for _ in range(32):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == PROMPT + CONTINUATION


def test_unseen_text_is_predicted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(UNSEEN, return_tensors="pt")["input_ids"]  # (1, tokens)
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    bits_per_character = loss * (ids.shape[1] - 1) / math.log(2) / len(UNSEEN)
    # the card says about 1.45 over whole books; a uniform guess over the vocabulary costs about 3.7
    assert bits_per_character < 1.9


def test_card_tells_how_it_was_made(directory: Path) -> None:
    card = (directory / "README.md").read_text("utf-8")
    for fact in (r"\| seed \| \d+ \|", r"\| held-out perplexity \| \d+\.\d+ per token \|",
                 r"\| held-out bits per character \| \d\.\d+ \|", r"books \| `[0-9a-f]{64}` \|",
                 r"license: apache-2\.0", r"public\s+domain", r"Grimm's Fairy Tales"):  # fmt: skip
        assert re.search(fact, card), fact
