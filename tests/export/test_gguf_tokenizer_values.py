"""What files say of a tokenizer: tokens and their ids, special tokens, chat templates, the Modelfile."""

from __future__ import annotations

import copy
import json
import random
import time
from contextlib import nullcontext

import pytest
import tokenizers
from stock_tokens import CHATML, LINES, edit_tokenizer, stock_tokens
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer

from irq_export.export.gguf import to_gguf
from irq_export.export.gguf.modelfile import modelfile
from irq_export.export.gguf.tokenizer import read_tokenizer
from irq_export.export.gguf.vocabulary import TokenType
from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel
from irq_formats.gguf import STR, open_gguf
from irq_formats.gguf.writer import encode_header
from irq_runtime.reference import load_model
from irq_runtime.tokenizer import load_tokenizer


def _add(t, *texts):
    """Add tokens behind the last id."""
    first = 1 + max(t["model"]["vocab"].values())
    t["added_tokens"] += [
        {**t["added_tokens"][0], "id": first + i, "content": text} for i, text in enumerate(texts)
    ]


def test_padding_does_not_repeat_a_token(tmp_path):
    save_tiny_tokenizer(tmp_path)
    edit_tokenizer(tmp_path, lambda t: _add(t, f"[PAD{VOCAB_SIZE - 1}]", "[PAD7]"))
    trained = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert stock_tokens(tmp_path, tmp_path, VOCAB_SIZE, LINES) == [trained.encode(line).ids for line in LINES]
    tokens = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).values["tokenizer.ggml.tokens"].value
    assert tokens[-1] == f"[[PAD{VOCAB_SIZE - 1}]"
    assert len(set(tokens)) == VOCAB_SIZE


def _as_the_library(tokenizer):
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    return all(library.token_to_id(token["content"]) == token["id"] for token in tokenizer["added_tokens"])


def test_ids_that_the_library_ignores_are_refused(tmp_path):
    """Changes of ids at random, and gaps: what is accepted has the ids it has in Hugging Face's library."""
    save_tiny_tokenizer(tmp_path)
    edit_tokenizer(tmp_path, lambda t: _add(t, "<0>", "<1>", "<2>"))
    text = (tmp_path / "tokenizer.json").read_text()
    rng = random.Random(0)
    accepted = 0
    for _ in range(100):
        tokenizer = json.loads(text)
        token = rng.choice(tokenizer["added_tokens"])
        change = rng.choice(
            ["leave out", "swap", "move", "of the vocabulary", "out of the vocabulary", "nothing"]
        )
        if change == "leave out":
            tokenizer["added_tokens"].remove(token)
        elif change == "swap":
            other = rng.choice(tokenizer["added_tokens"])
            token["id"], other["id"] = other["id"], token["id"]
        elif change == "move":
            token["id"] += 1
        elif change == "of the vocabulary":
            token["content"] = "Ġthe"
        elif change == "out of the vocabulary":
            tokenizer["model"]["vocab"].pop(token["content"], None)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        expected = _as_the_library(tokenizer)
        for stock in (True, False):
            with nullcontext() if expected else pytest.raises(MalformedFile, match=r"another id|share an id"):
                read_tokenizer(tmp_path, VOCAB_SIZE, stock=stock)
        accepted += expected
    assert 20 < accepted < 80


def test_a_token_without_a_row_is_for_stock_files_only(tmp_path):
    write_tiny_checkpoint(tmp_path / "checkpoint", vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    save_tiny_tokenizer(tmp_path / "checkpoint")
    edit_tokenizer(tmp_path / "checkpoint", lambda t: _add(t, *(f"<{i}>" for i in range(24)), "[PAD]"))
    with pytest.raises(UnsupportedModel, match="no row in the embedding"):
        to_gguf(tmp_path / "checkpoint", tmp_path / "pair", profile="stock")
    result = to_gguf(tmp_path / "checkpoint", tmp_path / "m.gguf")
    assert "'[PAD]' has no row" in result.notes[0]
    file = open_gguf(tmp_path / "m.gguf")
    assert file.metadata["tokenizer.ggml.model"] == "none"
    tokens = load_tokenizer(file).encode("[PAD]", add_special=False)
    assert tokens == [VOCAB_SIZE]
    with pytest.raises(IrqError, match=str(VOCAB_SIZE)):
        load_model(tmp_path / "m.gguf").logits(tokens)


def test_special_tokens_and_padding(tmp_path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    values = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).values
    got = {key: values[f"tokenizer.ggml.{key}_token_id"].value for key in ("bos", "eos", "eot")}
    assert got == {"bos": 0, "eos": 1, "eot": 3}
    tokens, types = (values[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCAB_SIZE - 1}]", TokenType.UNUSED)
    assert list(types[:4]) == [TokenType.CONTROL] * 4
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nowhere>"}))
    with pytest.raises(MalformedFile, match="bos_token is not in the vocabulary"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


def test_chat_templates_of_every_form(tmp_path):
    save_tiny_tokenizer(tmp_path, chat_template=CHATML)
    assert read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).values["tokenizer.chat_template"].value == CHATML
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    values = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).values
    assert values["tokenizer.ggml.bos_token_id"].value == 0  # not declared any more, but added
    assert values["tokenizer.chat_template"].value == "A"
    assert values["tokenizer.chat_template.tool_use"].value == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    values = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).values
    assert values["tokenizer.chat_template"].value == "C"
    assert "tokenizer.chat_templates" not in values
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("D")
    (more / "größer.jinja").write_text("E")
    found = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
    assert found.values["tokenizer.chat_template"].value == "C"
    assert found.values["tokenizer.chat_templates"].value == ["rag"]
    assert found.values["tokenizer.chat_template.rag"].value == "D"
    assert found.notes == ["left out: chat templates whose names GGUF cannot hold: größer"]


def test_a_chat_template_that_is_no_text_is_malformed(tmp_path):
    save_tiny_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(MalformedFile, match="not UTF-8"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
    with path.open("wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(MalformedFile, match="too large"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


def test_without_tokenizer_json(tmp_path):
    found = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
    assert found.values["tokenizer.ggml.model"].value == "none"
    assert "no tokenizer" in found.notes[0]
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


def test_modelfile_says_only_what_is_known():
    known = modelfile("base.gguf", "adapter.gguf", "{{ bos_token }}" + CHATML, "<s>")
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}' in known
    for template in (
        CHATML + "!",
        CHATML + "{{ broken",
        CHATML + "{{ raise_exception('no') }}",
        "{{ messages }}",
    ):
        unknown = modelfile("base.gguf", None, template, "")
        assert 'TEMPLATE """' not in unknown
        assert "# TEMPLATE: left to Ollama" in unknown
        assert "ADAPTER" not in unknown


def test_modelfile_has_the_system_message_of_the_template():
    """As SmolLM2 and Qwen2.5 have it; BOS may be the token with which a message begins."""
    said = "You are {{ 'a' }} helpful\nassistant"
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\n" + said + "<|im_end|>\n{% endif %}"
    for bos in ("<|im_start|>", "<s>", ""):
        written = modelfile("base.gguf", None, own + CHATML, bos)
        assert 'TEMPLATE """{{- range .Messages }}<|im_start|>' in written
        assert written.endswith('SYSTEM """You are a helpful\nassistant"""\n')
        assert "SYSTEM" not in modelfile("base.gguf", None, CHATML, bos)
    dated = own.replace("helpful", "{{ strftime_now('%d %b') }}")
    for other in (
        dated,
        own.replace("<|im_end|>", ""),
        own.replace("system\n", "user\n"),
        own.replace("You", '"""'),
    ):
        assert "# TEMPLATE: left to Ollama" in modelfile("base.gguf", None, other + CHATML, "<s>")


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% if messages | length > 3 %}{{ 'a' * 9999999999 }}{% endif %}",
    ],
)
def test_a_modelfile_waits_for_no_template(endless):
    start = time.monotonic()
    assert "# TEMPLATE: left to Ollama" in modelfile("base.gguf", None, endless + CHATML, "")
    assert time.monotonic() - start < 30


def _paths(node, path=()):
    """Every place of a JSON document; of long lists and objects the first and the last entry."""
    yield path
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    for key in keys if len(keys) <= 12 else (keys[0], keys[-1]):
        yield from _paths(node[key], (*path, key))


def _is_refused(directory, stock):
    try:
        values = read_tokenizer(directory, VOCAB_SIZE, stock=stock).values
    except IrqError:
        return True
    encode_header({"general.architecture": STR("llama"), **values}, [])  # every value can be written
    return False


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("smollm", "tokenizer.json"),
        ("sentencepiece", "tokenizer.json"),
        ("smollm", "tokenizer_config.json"),
    ],
)
def test_any_damage_to_the_structure_is_refused_or_read(tmp_path, kind, file):
    """Every value replaced by ones of every type, and left out: an error of ours, or a file."""
    save_tiny_tokenizer(tmp_path, kind, chat_template=CHATML)
    original = json.loads((tmp_path / file).read_text())
    original.setdefault("chat_template", [{"name": "default", "template": "A"}])
    refused = 0
    for path in _paths(original):
        for value in (None, True, -1, 2**70, "x", "\ud800", [None], {"x": 1}, ...):
            document = copy.deepcopy(original)
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            if not path:
                document = value if value is not ... else []
            elif value is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            (tmp_path / file).write_text(json.dumps(document))
            refused += sum(_is_refused(tmp_path, stock) for stock in (True, False))
    assert refused > 20
