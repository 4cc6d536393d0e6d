"""What is trained on is what is deployed: the tokens of tokenizer.json, whatever class reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer
from tokenizers import Tokenizer

from irq_export.export.gguf import to_gguf
from irq_export.train.config import TrainConfig
from irq_export.train.dataset import load_rows
from irq_export.train.run import load_tokenizer
from irq_formats.errors import MalformedFile
from irq_formats.gguf import open_gguf
from irq_runtime.tokenizer import load_tokenizer as deployed_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"


def llama_tokenizer(directory: Path, **config: object) -> None:
    """Write a SentencePiece tokenizer as Llama 2 has it."""
    save_tiny_tokenizer(directory, "sentencepiece", chat_template=TEMPLATE)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "</s>", **config}))


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
    ids=str,
)
def test_the_words_of_a_chat_are_the_tokens_of_the_deployed_file(
    tmp_path: Path, config: dict[str, object]
) -> None:
    write_tiny_checkpoint(tmp_path / "model", vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    llama_tokenizer(tmp_path / "model", **config)
    turns = [{"role": "user", "content": " the quick"}, {"role": "assistant", "content": "the on"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns}]))
    settings = TrainConfig(
        model=str(tmp_path / "model"), data=(str(tmp_path / "data.json"),), output=str(tmp_path / "run")
    )
    rows = load_rows(settings.data, load_tokenizer(settings.model), settings)
    to_gguf(tmp_path / "model", tmp_path / "m.gguf")
    deployed = deployed_tokenizer(open_gguf(tmp_path / "m.gguf"))
    text = deployed.render_chat(turns, add_generation_prompt=False)
    assert text == "<|im_start|> the quick<|im_end|><|im_start|>the on<|im_end|>"
    assert rows[0][0].ids.tolist() == deployed.encode(text, add_special=False)


def added_as(**flags: bool) -> dict[str, object]:
    """A tokenizer_config.json that gives a token, <|im_start|>, other flags."""
    token = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False}
    return {"added_tokens_decoder": {"3": {**token, "single_word": False, "special": True, **flags}}}


@pytest.mark.parametrize(
    "config",
    [
        added_as(rstrip=True),
        added_as(normalized=True),
        {"additional_special_tokens": ["he"]},
        {"split_special_tokens": True},
        {"add_bos_token": False},
    ],
    ids=str,
)
def test_the_configuration_does_not_change_the_tokens(tmp_path: Path, config: dict[str, object]) -> None:
    llama_tokenizer(tmp_path, **config)
    rules = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("<|im_start|> the quick<|im_end|>", "a<|im_start|>b", "the quick " * 20):
        assert tokenizer(text)["input_ids"] == rules.encode(text).ids
    assert tokenizer.eos_token_id == rules.token_to_id("</s>")
    assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"


def test_what_transformers_cannot_read_is_malformed(tmp_path: Path) -> None:
    llama_tokenizer(tmp_path, eos_token={"content": "</s>", "lstrip": False})  # without its __type
    with pytest.raises(MalformedFile, match="transformers cannot read the tokenizer"):
        load_tokenizer(tmp_path)
