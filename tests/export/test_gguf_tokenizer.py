"""The tokenizer in a stock file: llama.cpp must cut text exactly where Hugging Face does."""

from __future__ import annotations

import json

import pytest
import tokenizers
from stock_tokens import LINES, edit_tokenizer, stock_tokens
from tiny_tokenizers import PRE_TOKENIZERS, VOCAB_SIZE, save_tiny_tokenizer

from irq_export.export.gguf import pre_tokenizer
from irq_export.export.gguf.tokenizer import read_tokenizer
from irq_export.export.gguf.vocabulary import TokenType
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.gguf import open_gguf
from irq_runtime.tokenizer import load_tokenizer


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
    assert stock_tokens(tmp_path, tmp_path, VOCAB_SIZE, LINES) == expected
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
    assert stock_tokens(tmp_path, directory, vocab_size, lines) == [
        trained.encode(line).ids for line in lines
    ]


def test_the_demo_model_tokenizes_alike(tmp_path, repo):
    directory = repo / "irq_export" / "demo_model"
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    trained = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert stock_tokens(tmp_path, directory, vocab_size, LINES) == [
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


@pytest.mark.parametrize("change", [_metaspace("never"), _metaspace("never", split=True), _replace])
def test_sentencepiece_without_a_space_before_the_text(tmp_path, change):
    save_tiny_tokenizer(tmp_path, "sentencepiece")
    edit_tokenizer(tmp_path, change)
    trained = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lines = [*LINES, "▁the", "a ▁ b"]
    assert stock_tokens(tmp_path, tmp_path, VOCAB_SIZE, lines) == [trained.encode(line).ids for line in lines]
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
    edit_tokenizer(tmp_path, change)
    with pytest.raises(UnsupportedModel, match=r"llama\.cpp"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
    ours = read_tokenizer(tmp_path, VOCAB_SIZE, stock=False)
    assert ours.values["tokenizer.ggml.model"].value == "none"
    assert "no tokens in llama.cpp's terms" in ours.notes[0]


def test_what_transformers_rewrote_is_refused_with_advice(tmp_path):
    save_tiny_tokenizer(tmp_path, "sentencepiece")
    edit_tokenizer(tmp_path, _metaspace("first"))
    with pytest.raises(UnsupportedModel, match="normaliser Prepend instead, train with that one"):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)


def test_text_that_is_not_nfc_is_noted(tmp_path):
    save_tiny_tokenizer(tmp_path, "qwen2")
    assert read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).notes == []
    edit_tokenizer(tmp_path, lambda t: t.update(normalizer={"type": "NFC"}))
    assert "NFC" in read_tokenizer(tmp_path, VOCAB_SIZE, stock=True).notes[0]


def _other_regex(tokenizer):
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"


def test_an_unknown_pre_tokenizer_is_refused_with_a_way_out(tmp_path):
    save_tiny_tokenizer(tmp_path, "qwen2")
    edit_tokenizer(tmp_path, _other_regex)
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
    edit_tokenizer(tmp_path, change)
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
    edit_tokenizer(tmp_path, change)
    with pytest.raises(MalformedFile, match=message):
        read_tokenizer(tmp_path, VOCAB_SIZE, stock=True)
