"""The tokenizer in a stock file: llama.cpp must cut text exactly where Hugging Face does."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import tokenizers
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import PRE_TOKENIZERS, TEXT, VOCAB_SIZE, save_tiny_tokenizer

from irq_export.export.gguf import pre_tokenizer, to_gguf
from irq_export.export.gguf.modelfile import modelfile
from irq_export.export.gguf.tokenizer import read_tokenizer
from irq_export.export.gguf.vocabulary import TokenType
from irq_export.parity.llamacpp import LlamaCpp
from irq_formats.blocks import BlockSpec
from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel, UsageError
from irq_formats.gguf import STR, open_gguf
from irq_formats.gguf.writer import encode_header
from irq_runtime.reference import load_model
from irq_runtime.tokenizer import load_tokenizer

LINES = [
    *TEXT[:3],
    "the quick 1234567 brown's",
    "  the  quickest\n\n x  ",
    "naïve 東京!!! 2024-01-01",
    "WE'LL see what I'd do\r\n\r\n\tthen…",
    "🙂 emoji, e\u0301 combining, ​zero width",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a",
    " ",
    "<|im_start|>the quick<|im_end|> the quick <|im_end|>\n",
    "the   ",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _stock_tokens(tmp_path: Path, tokenizer_dir: Path, vocab_size: int, lines: list[str]) -> list[list[int]]:
    """Export a tiny model with the tokenizer of a directory; return what llama.cpp makes of the lines."""
    checkpoint = tmp_path / "checkpoint"
    write_tiny_checkpoint(
        checkpoint, BlockSpec("int4"), embedding=True, tied=True, vocab_size=vocab_size, num_hidden_layers=1
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, checkpoint / name)
    to_gguf(checkpoint, tmp_path / "pair", profile="stock")
    base, adapter = (tmp_path / "pair" / name for name in ("base.gguf", "adapter.gguf"))
    verbatim = open_gguf(base).metadata["tokenizer.huggingface.json"]
    assert verbatim == (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    with LlamaCpp(base, adapter, threads=1, ctx=64) as model:
        return [list(model.tokenize(line)) for line in lines]


@pytest.mark.parametrize(
    ("kind", "bos"),
    [
        *((kind, True) for kind in [*PRE_TOKENIZERS, "sentencepiece"]),
        ("smollm", False),
        ("sentencepiece", False),
    ],
)
def test_llama_cpp_tokenizes_alike(tmp_path, kind, bos):
    trained = save_tiny_tokenizer(tmp_path, kind, bos=bos)
    expected = [trained.encode(line).ids for line in LINES]
    assert _stock_tokens(tmp_path, tmp_path, VOCAB_SIZE, LINES) == expected
    values = open_gguf(tmp_path / "pair" / "base.gguf").metadata
    assert values["tokenizer.ggml.pre"] == ("default" if kind == "sentencepiece" else kind)
    assert values["tokenizer.ggml.add_bos_token"] is bos
    ours = load_tokenizer(open_gguf(tmp_path / "pair" / "base.gguf"))
    assert [ours.encode(line) for line in LINES] == expected


@pytest.mark.parametrize(
    ("model", "vocab_size"), [("stories260k-fp32/hf", 512), ("smollm2-135m-instruct", 49152)]
)
def test_llama_cpp_tokenizes_real_text_alike(tmp_path, shared_data, model, vocab_size):
    directory = shared_data / "models" / model
    trained = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    lines = [*LINES, *text.splitlines()[:100]]
    lines = [line for line in lines if line]
    assert len(lines) > len(LINES) + 40
    assert _stock_tokens(tmp_path, directory, vocab_size, lines) == [
        trained.encode(line).ids for line in lines
    ]


def test_the_demo_model_tokenizes_alike(tmp_path, repo):
    directory = repo / "irq_export" / "demo_model"
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    trained = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert _stock_tokens(tmp_path, directory, vocab_size, LINES) == [
        trained.encode(line).ids for line in LINES
    ]


def test_scores_rank_pieces_as_sentencepiece_does(shared_data):
    """stories260K has both files: the scores made from merges order pieces as tokenizer.model does."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = shared_data / "models" / "stories260k-fp32" / "hf"
    original = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    values = read_tokenizer(directory, 512, stock=True).values
    scores, types = (values[f"tokenizer.ggml.{key}"].value for key in ("scores", "token_type"))
    tokens = values["tokenizer.ggml.tokens"].value
    assert tokens == [original.id_to_piece(i) for i in range(512)]
    made = [i for i in range(512) if scores[i] != 0 or tokens[i] == "▁t"]
    assert sorted(made, key=lambda i: -scores[i]) == sorted(made, key=lambda i: -original.get_score(i))
    for i in range(512):
        expected = TokenType.BYTE if original.is_byte(i) else TokenType.NORMAL
        expected = TokenType.CONTROL if original.is_control(i) else expected
        assert types[i] == (TokenType.UNKNOWN if original.is_unknown(i) else expected)


def _metaspace(scheme, **fields):
    """A change to Metaspace as transformers 5 writes it, without normaliser."""
    fields = {"replacement": "▁", "prepend_scheme": scheme, "split": False, **fields}
    return lambda t: t.update(normalizer=None, pre_tokenizer={"type": "Metaspace", **fields})


def _replace(t):
    t["normalizer"]["normalizers"].pop(0)


@pytest.mark.parametrize(
    ("change", "split"), [(_metaspace("never"), True), (_metaspace("never"), False), (_replace, False)]
)
def test_sentencepiece_without_a_space_before_the_text(tmp_path, change, split):
    save_tiny_tokenizer(tmp_path, "sentencepiece")
    _edit(tmp_path, change)
    if split:
        _edit(tmp_path, lambda t: t["pre_tokenizer"].pop("split"))  # the default, harmless here
    trained = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lines = [*LINES, "▁the", "a ▁ b"]
    assert _stock_tokens(tmp_path, tmp_path, VOCAB_SIZE, lines) == [
        trained.encode(line).ids for line in lines
    ]
    values = open_gguf(tmp_path / "pair" / "base.gguf").metadata
    assert values["tokenizer.ggml.add_space_prefix"] is False


def _spaces_in_pieces(t):
    _metaspace("never", split=True)(t)
    t["model"]["vocab"]["▁▁"] = len(t["model"]["vocab"])
    t["model"]["merges"].append(["▁", "▁"])


def _replace_word(t):
    step = {"type": "Replace", "pattern": {"String": "quick"}, "content": "slow"}
    t["normalizer"]["normalizers"].append(step)


def _split(t):
    t["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": "h"},
        "behavior": "Isolated",
        "invert": False,
    }


def _processor(kind):
    return lambda t: t.update(post_processor={"type": kind, "sep": ["</s>", 1], "cls": ["<s>", 0]})


def _flag(name):
    return lambda t: t["added_tokens"][-1].update({name: True})


#: Changes after which Hugging Face and llama.cpp make different tokens of some line.
UNLIKE = {
    "metaspace first": ("sentencepiece", _metaspace("first")),
    "metaspace always": ("sentencepiece", _metaspace("always")),
    "metaspace splits pieces": ("sentencepiece", _spaces_in_pieces),
    "normaliser and splitter": ("sentencepiece", _split),
    "a word is replaced": ("sentencepiece", _replace_word),
    "normalised tokens": ("sentencepiece", _flag("normalized")),
    "lstrip": ("gpt-2", _flag("lstrip")),
    "rstrip": ("gpt-2", _flag("rstrip")),
    "single word": ("gpt-2", _flag("single_word")),
    "roberta": ("gpt-2", _processor("RobertaProcessing")),
    "bert": ("gpt-2", _processor("BertProcessing")),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_llama_cpp_does_otherwise_is_refused(tmp_path, name):
    kind, change = UNLIKE[name]
    save_tiny_tokenizer(tmp_path, kind)
    _edit(tmp_path, change)
    with pytest.raises(UnsupportedModel, match=r"llama\.cpp"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
    ours = read_tokenizer(tmp_path, VOCAB_SIZE, stock=False)
    assert ours.values["tokenizer.ggml.model"].value == "none"
    assert "no tokens in llama.cpp's terms" in ours.notes[0]


def test_what_transformers_rewrote_is_refused_with_advice(tmp_path):
    save_tiny_tokenizer(tmp_path, "sentencepiece")
    _edit(tmp_path, _metaspace("first"))
    with pytest.raises(UnsupportedModel, match="normaliser Prepend instead, train with that one"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


def test_text_that_is_not_nfc_is_noted(tmp_path):
    save_tiny_tokenizer(tmp_path, "qwen2")
    assert read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).notes == []
    _edit(tmp_path, lambda t: t.update(normalizer={"type": "NFC"}))
    assert "NFC" in read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).notes[0]


def _edit(directory: Path, change) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def _other_regex(tokenizer):
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"


def test_an_unknown_pre_tokenizer_is_refused_with_a_way_out(tmp_path):
    save_tiny_tokenizer(tmp_path, "qwen2")
    _edit(tmp_path, _other_regex)
    with pytest.raises(UnsupportedModel, match="--pre-tokenizer NAME"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
    named = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True, pre_tokenizer="qwen2")
    assert named.values["tokenizer.ggml.pre"].value == "qwen2"
    ours = read_tokenizer(tmp_path, VOCAB_SIZE, stock=False)  # the irq profile carries tokenizer.json
    assert any("pre_tokenizer" in note for note in ours.notes)
    assert "tokenizer.ggml.tokens" not in ours.values
    assert ours.values["tokenizer.ggml.bos_token_id"].value == 0


def test_sentencepiece_has_no_pre_tokenizer(tmp_path):
    save_tiny_tokenizer(tmp_path, "sentencepiece")
    for stock in (True, False):
        with pytest.raises(UsageError, match="no pre-tokenizer to name"):
            read_tokenizer(tmp_path, VOCAB_SIZE, stock=stock, pre_tokenizer="qwen2")


def test_every_pre_tokenizer_we_recognise_can_be_named():
    assert set(pre_tokenizer.PRE_TOKENIZERS.values()) <= pre_tokenizer.LLAMACPP_NAMES


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt-2", lambda t: t.update(normalizer={"type": "Lowercase"}), "cannot normalise"),
        ("gpt-2", lambda t: t["model"].update(type="WordPiece"), "kind of tokenizer"),
        ("gpt-2", lambda t: t["model"].update(end_of_word_suffix="</w>"), "no such option"),
        ("gpt-2", lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "no pre-tokenizer"),
        ("sentencepiece", lambda t: t["model"]["merges"].pop(3), "is no merge"),
        ("sentencepiece", lambda t: t["model"].update(ignore_merges=True), "no such option"),
        (
            "sentencepiece",
            lambda t: t["model"]["merges"].append(t["model"]["merges"].pop(2)),
            "SentencePiece",
        ),
        (
            "sentencepiece",
            lambda t: t.update(pre_tokenizer={"type": "Whitespace"}, normalizer=None),
            "cannot treat spaces",
        ),
        ("gpt-2", lambda t: t["post_processor"]["special_tokens"]["<s>"].update(ids=[1]), "bos token"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_refused(tmp_path, kind, change, message):
    save_tiny_tokenizer(tmp_path, kind)
    _edit(tmp_path, change)
    with pytest.raises(UnsupportedModel, match=message):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update(stranger=-1), "negative"),
        (lambda t: t["model"]["vocab"].update(twin=5), "share an id"),
        (lambda t: t["model"]["merges"].append("a b c"), "not a merge"),
        (lambda t: t["model"].pop("vocab"), "no model"),
    ],
)
def test_a_broken_tokenizer_is_malformed(tmp_path, change, message):
    save_tiny_tokenizer(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(MalformedFile, match=message):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


def _add(t, *texts):
    """Add tokens behind the last id."""
    first = 1 + max(t["model"]["vocab"].values())
    t["added_tokens"] += [
        {**t["added_tokens"][0], "id": first + i, "content": text} for i, text in enumerate(texts)
    ]


def test_padding_does_not_repeat_a_token(tmp_path):
    save_tiny_tokenizer(tmp_path)
    _edit(tmp_path, lambda t: _add(t, f"[PAD{VOCAB_SIZE - 1}]", "[PAD7]"))
    trained = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert _stock_tokens(tmp_path, tmp_path, VOCAB_SIZE, LINES) == [
        trained.encode(line).ids for line in LINES
    ]
    tokens = read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).values["tokenizer.ggml.tokens"].value
    assert tokens[-1] == f"[[PAD{VOCAB_SIZE - 1}]"
    assert len(set(tokens)) == VOCAB_SIZE


def _as_the_library(tokenizer):
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    return all(library.token_to_id(token["content"]) == token["id"] for token in tokenizer["added_tokens"])


def test_ids_that_the_library_ignores_are_refused(tmp_path):
    """Changes of ids at random, and gaps: what is accepted has the ids it has in Hugging Face's library."""
    save_tiny_tokenizer(tmp_path)
    _edit(tmp_path, lambda t: _add(t, "<0>", "<1>", "<2>"))
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
    _edit(tmp_path / "checkpoint", lambda t: _add(t, *(f"<{i}>" for i in range(24)), "[PAD]"))
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
