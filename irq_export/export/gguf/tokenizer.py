"""Tokenizer and chat template as GGUF metadata.

``tokenizer.huggingface.json`` is always the checkpoint's ``tokenizer.json``, byte for byte: it is what
our own runtimes use. The ``tokenizer.ggml.*`` keys say the same in llama.cpp's terms; for a stock file
they must be exact, for a file of the irq profile they are a courtesy to viewers and left out, with a
note, where llama.cpp has no equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from irq_export.export.gguf.llamacpp_rules import (
    added_around,
    check_added_tokens,
    normalises_text,
    prefixes_space,
)
from irq_export.export.gguf.pre_tokenizer import recognise_pre_tokenizer
from irq_export.export.gguf.vocabulary import Vocabulary, read_vocabulary
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.files import read_small
from irq_formats.gguf import BOOL, F32, I32, STR, U32, GgufValue
from irq_formats.gguf.rules import key_fault
from irq_formats.hf_tokenizer import END_TOKENS_KEY, chat_templates, check_added_ids, end_ids, special_ids
from irq_formats.strict_json import parse_object

__all__ = ["TokenizerMetadata", "read_tokenizer"]

_TEMPLATE = "tokenizer.chat_template"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MOST_BYTES = 256 << 20  # more than any tokenizer.json has


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a file says about its tokenizer.

    Attributes:
        values: GGUF metadata, ``tokenizer.*``.
        notes: What could not be said, for the user.
    """

    values: dict[str, GgufValue]
    notes: list[str] = field(default_factory=list)


def read_tokenizer(
    directory: Path, vocab_size: int, *, stock: bool, pre_tokenizer: str | None = None
) -> TokenizerMetadata:
    """Read the tokenizer of a Hugging Face directory.

    Without a ``tokenizer.json`` the file gets llama.cpp's ``none`` model, which encodes no text.

    Args:
        directory: Holds ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.
        vocab_size: Rows of the model's embedding.
        stock: The ``tokenizer.ggml.*`` keys must make llama.cpp tokenize exactly as Hugging Face.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if the user knows better.

    Raises:
        UsageError: ``pre_tokenizer`` is for byte-level BPE.
        UnsupportedModel: llama.cpp has no such tokenizer (``stock`` only).
        MalformedFile: The files contradict themselves.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        if (directory / "tokenizer.model").is_file():
            raise UnsupportedModel(
                "the checkpoint has a SentencePiece model but no tokenizer.json",
                where=directory,
                hint="Write one with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        note = "the checkpoint has no tokenizer: run, serve and perplexity need one as --tokenizer"
        return TokenizerMetadata({"tokenizer.ggml.model": STR("none")}, [note])
    text = read_small(path, limit=_MOST_BYTES)
    tokenizer = parse_object(text, where=path)
    values: dict[str, GgufValue] = {}
    notes: list[str] = []
    special = special_ids(directory, tokenizer)
    check_added_ids(tokenizer, path)
    try:
        check_added_tokens(tokenizer, path)
        values |= _vocabulary_values(tokenizer, vocab_size, path, pre_tokenizer)
        values |= _added_values(tokenizer, special, path)
        if values["tokenizer.ggml.model"].value == "gpt2" and normalises_text(tokenizer, path) and stock:
            notes.append("llama.cpp does not bring text into NFC, as this tokenizer does")
    except UnsupportedModel as error:
        if stock:
            raise
        values = {"tokenizer.ggml.model": STR("none")}
        notes.append(f"no tokens in llama.cpp's terms: {error}")
    if pre_tokenizer is not None and "tokenizer.ggml.pre" in values:
        notes.append(f"pre-tokenizer {pre_tokenizer} as given: irq-export verify shows if llama.cpp agrees")
    values |= {f"tokenizer.ggml.{key}": U32(token_id) for key, token_id in special.items()}
    ends = end_ids(directory, tokenizer)
    if unnamed := [end for end in ends if end not in {special.get(key) for key in _END_KEYS}]:
        values[END_TOKENS_KEY] = U32.array(ends)
        if stock:
            notes.append(f"llama.cpp's keys hold three end tokens; it may not stop at {unnamed}")
    named = chat_templates(directory)
    if unspeakable := sorted(name for name in named if key_fault(f"{_TEMPLATE}.{name}") is not None):
        notes.append(f"left out: chat templates whose names GGUF cannot hold: {', '.join(unspeakable)}")
    values |= _template_values({name: text for name, text in named.items() if name not in unspeakable})
    values["tokenizer.huggingface.json"] = STR(text.decode("utf-8"))
    return TokenizerMetadata(values, notes)


def _vocabulary_values(
    tokenizer: Mapping[str, object], vocab_size: int, path: Path, pre_tokenizer: str | None
) -> dict[str, GgufValue]:
    vocabulary = read_vocabulary(tokenizer, vocab_size, path)
    values = {"tokenizer.ggml.model": STR(vocabulary.model)}
    if vocabulary.model == "gpt2":
        values["tokenizer.ggml.pre"] = STR(pre_tokenizer or recognise_pre_tokenizer(tokenizer, path))
    else:
        if pre_tokenizer is not None:
            raise UsageError("a SentencePiece tokenizer has no pre-tokenizer to name", where=path)
        values["tokenizer.ggml.pre"] = STR("default")
        prefix = prefixes_space(tokenizer, vocabulary.has_inner_spaces, path)
        values["tokenizer.ggml.add_space_prefix"] = BOOL(prefix)
    return values | _token_values(vocabulary)


def _added_values(
    tokenizer: Mapping[str, object], special: Mapping[str, int], path: Path
) -> dict[str, GgufValue]:
    """Say which tokens the post-processor puts around a text: llama.cpp knows BOS before and EOS after.

    A token that is added but not declared as BOS or EOS becomes it.
    """
    values = {}
    for kind, added in zip(("bos", "eos"), added_around(tokenizer, path), strict=True):
        key = f"{kind}_token_id"
        if added and key not in special:
            values[f"tokenizer.ggml.{key}"] = U32(added[0])
        if added and added != [special.get(key, added[0])]:
            raise UnsupportedModel(
                f"the tokenizer adds tokens that are not its {kind} token",
                where=f"{path}: post_processor",
                expected=[special.get(key)],
                got=added,
            )
        values[f"tokenizer.ggml.add_{kind}_token"] = BOOL(bool(added))
    return values


def _token_values(vocabulary: Vocabulary) -> dict[str, GgufValue]:
    values = {"tokenizer.ggml.tokens": STR.array(vocabulary.tokens)}
    if vocabulary.scores is not None:
        values["tokenizer.ggml.scores"] = F32.array(vocabulary.scores)
    values["tokenizer.ggml.token_type"] = I32.array(vocabulary.types)
    if vocabulary.merges is not None:
        values["tokenizer.ggml.merges"] = STR.array(vocabulary.merges)
    return values


def _template_values(named: Mapping[str, str]) -> dict[str, GgufValue]:
    """Return the chat templates: the default one, and the names and texts of others."""
    values: dict[str, GgufValue] = {}
    if "default" in named:
        values[_TEMPLATE] = STR(named["default"])
    if more := [name for name in named if name != "default"]:
        values[f"{_TEMPLATE}s"] = STR.array(more)
        values |= {f"{_TEMPLATE}.{name}": STR(named[name]) for name in more}
    return values
