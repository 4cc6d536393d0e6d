"""What the files of a Hugging Face tokenizer say beside its vocabulary: special tokens and chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from irq_formats.errors import MalformedFile
from irq_formats.files import read_small
from irq_formats.strict_json import parse_object

__all__ = [
    "END_TOKENS_KEY",
    "MORE_TEMPLATES",
    "AddedToken",
    "added_tokens",
    "chat_templates",
    "check_added_ids",
    "end_ids",
    "special_ids",
]

#: All end tokens of a model that has more than llama.cpp's keys hold: key of GGUF, u32[].
END_TOKENS_KEY = "tokenizer.huggingface.eos_token_ids"

#: The folder in which transformers keeps chat templates beside the default one, each as NAME.jinja.
MORE_TEMPLATES = "additional_chat_templates"
#: More than any of these files has.
_MOST_BYTES = 64 << 20

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


@dataclass(frozen=True)
class AddedToken:
    """An entry of ``added_tokens``.

    Attributes:
        text: How it is written.
        token_id: Its id.
        flags: Those of its flags that are set: ``special``, ``normalized``, ``lstrip``, ``rstrip``,
            ``single_word``.
    """

    text: str
    token_id: int
    flags: frozenset[str]


def _read_json(path: Path) -> dict[str, object]:
    """Read a JSON object, ``{}`` if there is no such file."""
    if not path.is_file():
        return {}
    return parse_object(read_small(path, limit=_MOST_BYTES), where=path)


def chat_templates(directory: Path) -> dict[str, str]:
    """Return the chat templates of a Hugging Face directory by name; a single one is ``default``.

    They are in files of their own (``chat_template.jinja``, ``additional_chat_templates/NAME.jinja``), or in
    ``tokenizer_config.json`` as one string or a list of named ones.

    Raises:
        MalformedFile: An entry of the list is no template, or a file is too large or not UTF-8.
    """
    path, config_path = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    more = {file.stem: file for file in sorted(directory.glob(f"{MORE_TEMPLATES}/*.jinja"))}
    files = more | ({"default": path} if path.is_file() else {})
    if files:
        return {name: _read_template(file) for name, file in sorted(files.items())}
    template = _read_json(config_path).get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    found = {}
    for entry in template if isinstance(template, list) else []:
        fields = entry if isinstance(entry, Mapping) else {}
        name, text = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise MalformedFile(
                "not a chat template",
                where=config_path,
                expected="a name and a template",
                got=repr(entry)[:80],
            )
        found[name] = text
    return found


def _read_template(path: Path) -> str:
    try:
        return read_small(path, limit=_MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile("a chat template that is not UTF-8", where=path, got=error) from error


def special_ids(directory: Path, tokenizer: Mapping[str, object]) -> dict[str, int]:
    """Return the ids of the special tokens by GGUF key (without ``tokenizer.ggml.``).

    ``tokenizer_config.json`` names them; what it leaves out comes from ``config.json``. Of further end tokens
    the first two become eot and eom, at which runtimes stop too; :func:`end_ids` has all.

    Args:
        directory: The Hugging Face directory.
        tokenizer: Its parsed ``tokenizer.json``.

    Raises:
        MalformedFile: A named token is not in the vocabulary, or the file has another structure.
    """
    config = _read_json(directory / "tokenizer_config.json")
    model = _read_json(directory / "config.json")
    ids = _ids(tokenizer, directory / "tokenizer.json")
    known = set(ids.values())
    found: dict[str, int] = {}
    for name, key in _SPECIAL.items():
        token = config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is None:
            first = _ends(model.get(f"{name}_id"))
            if first and first[0] in known:
                found[key] = first[0]
        elif isinstance(text, str) and text in ids:
            found[key] = ids[text]
        else:
            raise MalformedFile(f"{name} is not in the vocabulary", where=directory, got=repr(text))
    more = [
        end for end in _listed_ends(directory, model) if end in known and end != found.get("eos_token_id")
    ]
    return found | dict(zip(_MORE_ENDS, more, strict=False))


def end_ids(directory: Path, tokenizer: Mapping[str, object]) -> list[int]:
    """Return every token that ends a reply, the tokenizer's end of sequence first.

    The others are those at which transformers stops: of ``generation_config.json``, else of ``config.json``.

    Args:
        directory: The Hugging Face directory.
        tokenizer: Its parsed ``tokenizer.json``.

    Raises:
        MalformedFile: As :func:`special_ids`.
    """
    first = special_ids(directory, tokenizer).get("eos_token_id")
    listed = _listed_ends(directory, _read_json(directory / "config.json"))
    known = set(_ids(tokenizer, directory / "tokenizer.json").values())
    ends = [*([] if first is None else [first]), *(end for end in listed if end in known)]
    return [*dict.fromkeys(ends)]


def _listed_ends(directory: Path, model: Mapping[str, object]) -> list[int]:
    generation = _read_json(directory / "generation_config.json").get("eos_token_id")
    return [*dict.fromkeys(_ends(model.get("eos_token_id") if generation is None else generation))]


def added_tokens(tokenizer: Mapping[str, object], where: object) -> list[AddedToken]:
    """Return the ``added_tokens`` of a parsed ``tokenizer.json``.

    Raises:
        MalformedFile: They are not a list of objects with a text and an id.
    """
    entries = tokenizer.get("added_tokens")
    found = []
    for entry in _list(entries, f"{where}: added_tokens"):
        fields = entry if isinstance(entry, Mapping) else {}
        text, token_id = fields.get("content"), fields.get("id")
        if not isinstance(text, str) or type(token_id) is not int:
            raise MalformedFile(
                "not an added token", where=where, expected="a content and an id", got=repr(entry)[:80]
            )
        flags = frozenset(str(name) for name, value in fields.items() if value is True)
        found.append(AddedToken(text, token_id, flags))
    return found


def check_added_ids(tokenizer: Mapping[str, object], where: object) -> None:
    """Check that added tokens have the ids under which Hugging Face's library will know them.

    It ignores those in the file: a token that is in the vocabulary has its id there, any other the next one
    behind the vocabulary and the added tokens so far.

    Args:
        tokenizer: The parsed ``tokenizer.json``.
        where: Its path, for messages.

    Raises:
        MalformedFile: One has not.
    """
    ids = _vocabulary(tokenizer, where)
    after = len(ids)
    for token in added_tokens(tokenizer, where):
        if not token.text:
            continue
        expected = ids.setdefault(token.text, after)
        if expected != token.token_id:
            raise MalformedFile(
                f"the tokenizers library gives the added token {token.text!r} another id",
                where=where,
                expected=expected,
                got=token.token_id,
                hint="Ids of added tokens follow each other, without a gap",
            )
        after = max(after, expected + 1)


def _list(value: object, where: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise MalformedFile("wrong type of value", where=where, expected="a list", got=type(value).__name__)
    return value


def _ids(tokenizer: Mapping[str, object], where: object) -> dict[str, int]:
    """Return text to id of vocabulary and added tokens."""
    added = {token.text: token.token_id for token in added_tokens(tokenizer, where)}
    return _vocabulary(tokenizer, where) | added


def _vocabulary(tokenizer: Mapping[str, object], where: object) -> dict[str, int]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # Unigram: [text, score] in order of ids
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab):
            raise MalformedFile("not a list of pieces and scores", where=f"{where}: model.vocab")
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    ids = dict(vocab) if isinstance(vocab, Mapping) else {}
    if not all(type(token_id) is int for token_id in ids.values()):
        raise MalformedFile("the vocabulary does not map text to ids", where=f"{where}: model.vocab")
    return ids


def _ends(value: object) -> list[int]:
    """Return an id or list of ids as a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int]
