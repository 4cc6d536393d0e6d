"""Which tokens begin, end, pad: ids from the files of a Hugging Face tokenizer, under GGUF's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from irq_formats.errors import MalformedFile
from irq_formats.files import open_fixed
from irq_formats.strict_json import parse_object

__all__ = ["read_json", "special_ids"]

#: Names of a special token: in tokenizer_config.json, and in GGUF.
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # [sic]
    "pad_token": "padding_token_id",
}
#: Where a model ends its turn with other tokens than eos, they go here.
_MORE_ENDS = ("eot_token_id", "eom_token_id")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object, ``{}`` if there is no such file."""
    if not path.is_file():
        return {}
    file = open_fixed(path)
    return parse_object(file.read_bytes(0, file.size), where=path)


def special_ids(directory: Path, tokenizer: Mapping[str, object]) -> dict[str, int]:
    """Return the ids of the special tokens by GGUF key (without ``tokenizer.ggml.``).

    ``tokenizer_config.json`` names them; what it leaves out comes from ``config.json``. Further
    end tokens of ``generation_config.json`` become eot and eom, at which runtimes stop too.

    Args:
        directory: The Hugging Face directory.
        tokenizer: Its parsed ``tokenizer.json``.

    Raises:
        MalformedFile: A named token is not in the vocabulary.
    """
    config = read_json(directory / "tokenizer_config.json")
    model = read_json(directory / "config.json")
    generation = read_json(directory / "generation_config.json")
    ids = _ids(tokenizer)
    known = set(ids.values())
    found: dict[str, int] = {}
    for name, key in _SPECIAL.items():
        token = config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is None:
            first = _ends(model.get(f"{name}_id"))
            if first and first[0] in known:
                found[key] = first[0]
        elif text in ids:
            found[key] = ids[str(text)]
        else:
            raise MalformedFile(f"{name} is not in the vocabulary", where=directory, got=repr(text))
    ends = [token_id for token_id in _ends(generation.get("eos_token_id")) if token_id in known]
    more = [token_id for token_id in ends if token_id != found.get("eos_token_id")]
    return found | dict(zip(_MORE_ENDS, more, strict=False))


def _ids(tokenizer: Mapping[str, object]) -> dict[str, int]:
    """Return text to id of vocabulary and added tokens."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # Unigram: [text, score] in order of ids
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    added = tokenizer.get("added_tokens")
    named = {token["content"]: token["id"] for token in added} if isinstance(added, list) else {}
    return {**(vocab if isinstance(vocab, Mapping) else {}), **named}


def _ends(value: object) -> list[int]:
    """Return an id or list of ids as a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int]
