"""Tokenizer and chat template as GGUF metadata.

``tokenizer.huggingface.json`` is always the checkpoint's ``tokenizer.json``, byte for byte: it is what
our own runtimes use. The ``tokenizer.ggml.*`` keys say the same in llama.cpp's terms; for a stock file
they must be exact, for a file of the irq profile they are a courtesy to viewers and left out, with a
note, where llama.cpp has no equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from irq_export.export.gguf.pre_tokenizer import recognise_pre_tokenizer
from irq_export.export.gguf.vocabulary import Vocabulary, read_vocabulary
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.files import open_fixed
from irq_formats.gguf import BOOL, F32, I32, STR, U32, GgufValue
from irq_formats.hf_tokenizer import chat_templates, special_ids
from irq_formats.strict_json import parse_object

__all__ = ["TokenizerMetadata", "read_tokenizer"]


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

    Without a ``tokenizer.json`` the file gets llama.cpp's ``none`` model, for which prompts are token ids.

    Args:
        directory: Holds ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.
        vocab_size: Rows of the model's embedding.
        stock: The ``tokenizer.ggml.*`` keys must make llama.cpp tokenize exactly as Hugging Face.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if the user knows better.

    Raises:
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
        note = "the checkpoint has no tokenizer: prompts must be token ids"
        return TokenizerMetadata({"tokenizer.ggml.model": STR("none")}, [note])
    file = open_fixed(path)
    text = file.read_bytes(0, file.size)
    tokenizer = parse_object(text, where=path)
    values: dict[str, GgufValue] = {}
    notes: list[str] = []
    special = special_ids(directory, tokenizer)
    try:
        values |= _vocabulary_values(tokenizer, vocab_size, path, pre_tokenizer)
        values |= _added_values(tokenizer, special, path)
    except UnsupportedModel as error:
        if stock:
            raise
        values = {"tokenizer.ggml.model": STR("none")}
        notes.append(f"no tokens in llama.cpp's terms: {error}")
    if pre_tokenizer is not None:
        notes.append(f"pre-tokenizer {pre_tokenizer} as given: irq-export verify shows if llama.cpp agrees")
    values |= {f"tokenizer.ggml.{key}": U32(token_id) for key, token_id in special.items()}
    values |= _template_values(directory)
    values["tokenizer.huggingface.json"] = STR(text.decode("utf-8"))
    return TokenizerMetadata(values, notes)


def _vocabulary_values(
    tokenizer: Mapping[str, object], vocab_size: int, path: Path, pre_tokenizer: str | None
) -> dict[str, GgufValue]:
    vocabulary = read_vocabulary(tokenizer, vocab_size, path)
    values = {"tokenizer.ggml.model": STR(vocabulary.model)}
    if vocabulary.model == "gpt2":
        _check_normalizer(tokenizer.get("normalizer"), {"NFC"}, path)
        values["tokenizer.ggml.pre"] = STR(pre_tokenizer or recognise_pre_tokenizer(tokenizer, path))
    else:
        values["tokenizer.ggml.pre"] = STR("default")
        values["tokenizer.ggml.add_space_prefix"] = BOOL(_adds_space_prefix(tokenizer, path))
    return values | _token_values(vocabulary)


def _added_values(
    tokenizer: Mapping[str, object], special: Mapping[str, int], path: Path
) -> dict[str, GgufValue]:
    """Say which tokens the post-processor puts around a text: llama.cpp knows BOS before and EOS after.

    A token that is added but not declared as BOS or EOS becomes it.
    """
    values = {}
    for kind, added in zip(("bos", "eos"), _template_ids(tokenizer, f"{path}: post_processor"), strict=True):
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


def _template_ids(tokenizer: Mapping[str, object], where: str) -> tuple[list[int], list[int]]:
    """Return the token ids that the post-processor puts before and after a text."""
    for processor in _flat(tokenizer.get("post_processor"), "processors"):
        if processor.get("type") != "TemplateProcessing":
            continue
        special, single = processor.get("special_tokens"), processor.get("single")
        if not isinstance(special, Mapping) or not isinstance(single, list):
            break
        sides: tuple[list[int], list[int]] = ([], [])
        side = 0
        for piece in single:
            if isinstance(piece, Mapping) and "Sequence" in piece:
                side = 1
            else:
                sides[side].extend(_special_piece(piece, special, where))
        return sides
    return [], []


def _special_piece(piece: object, special: Mapping[str, object], where: str) -> list[int]:
    """Return the ids of a special token of a template."""
    token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
    name = token.get("id") if isinstance(token, Mapping) else None
    entry = special.get(name) if isinstance(name, str) else None
    ids = entry.get("ids") if isinstance(entry, Mapping) else None
    if not isinstance(ids, list) or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise MalformedFile("a template without its tokens", where=where, got=repr(piece)[:80])
    return ids


def _flat(node: object, key: str) -> Iterator[Mapping[str, object]]:
    """Yield the steps of a component of tokenizer.json that may be a sequence."""
    if not isinstance(node, Mapping):
        return
    children = node.get(key)
    if node.get("type") == "Sequence" and isinstance(children, list):
        for child in children:
            yield from _flat(child, key)
    else:
        yield node


def _check_normalizer(normalizer: object, allowed: set[str], path: Path) -> None:
    kinds = [str(step.get("type")) for step in _flat(normalizer, "normalizers")]
    if not set(kinds) <= allowed:
        raise UnsupportedModel(
            "llama.cpp cannot normalise text like this tokenizer",
            where=f"{path}: normalizer",
            expected=sorted(allowed),
            got=kinds,
        )


def _adds_space_prefix(tokenizer: Mapping[str, object], path: Path) -> bool:
    """Tell whether a SentencePiece tokenizer puts a space before the text."""
    normalizer = tokenizer.get("normalizer")
    _check_normalizer(normalizer, {"Prepend", "Replace"}, path)
    if any(step.get("type") == "Prepend" for step in _flat(normalizer, "normalizers")):
        return True
    steps = list(_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    if any(step.get("type") != "Metaspace" for step in steps):
        raise UnsupportedModel(
            "llama.cpp cannot split text like this tokenizer",
            where=f"{path}: pre_tokenizer",
            expected="none or Metaspace",
            got=[step.get("type") for step in steps],
        )
    return any(step.get("prepend_scheme", "always") != "never" for step in steps)


def _template_values(directory: Path) -> dict[str, GgufValue]:
    """Return the chat templates: the default one, and the names and texts of others."""
    named = chat_templates(directory)
    values = {}
    if "default" in named:
        values["tokenizer.chat_template"] = STR(named.pop("default"))
    if named:
        values["tokenizer.chat_templates"] = STR.array(list(named))
        values |= {f"tokenizer.chat_template.{name}": STR(text) for name, text in named.items()}
    return values
