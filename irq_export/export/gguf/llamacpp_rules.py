"""Which rules of a ``tokenizer.json``, beside vocabulary and splitting, does llama.cpp follow?

It knows one treatment of spaces (a space before every stretch of text between special tokens, or before
none), BOS before a text and EOS behind it, and special tokens that match wherever their text stands. What
else a file asks for is refused: tokens that differ from those of training are not what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.hf_tokenizer import added_tokens

__all__ = ["added_around", "check_added_tokens", "normalises_text", "prefixes_space"]

_SPACE = "▁"  # how SentencePiece writes a space
_HINT = "Use --profile irq, which carries tokenizer.json itself"
_REWRITTEN = (
    f"{_HINT}. transformers 5 writes this form when it saves a Llama tokenizer: where the original model's "
    "tokenizer.json has the normaliser Prepend instead, train with that one"
)

_Step = Mapping[str, object]


def check_added_tokens(tokenizer: Mapping[str, object], where: object) -> None:
    """Check that added tokens match as llama.cpp matches them: as they are written, wherever they stand.

    Raises:
        UnsupportedModel: One takes the white space beside it, or matches whole words or normalised text only.
    """
    prepends = any(step.get("type") == "Prepend" for step in _steps(tokenizer, "normalizer"))
    for token in added_tokens(tokenizer, where):
        for flag in ("lstrip", "rstrip", "single_word", *(["normalized"] if prepends else [])):
            if flag in token.flags:
                raise UnsupportedModel(
                    f"llama.cpp does not match a token with the flag {flag} as this tokenizer does",
                    where=f"{where}: added_tokens",
                    got=repr(token.text),
                    hint=_HINT,
                )


def added_around(tokenizer: Mapping[str, object], where: object) -> tuple[list[int], list[int]]:
    """Return the token ids that the post-processor puts before and after a text.

    Raises:
        UnsupportedModel: It does more than that.
        MalformedFile: A template names tokens that it does not define.
    """
    where = f"{where}: post_processor"
    steps = [step for step in _steps(tokenizer, "post_processor") if step.get("type") != "ByteLevel"]
    if not steps:
        return [], []
    template = steps[0]
    special, single = template.get("special_tokens"), template.get("single")
    if len(steps) > 1 or not isinstance(special, Mapping) or not isinstance(single, list):
        raise UnsupportedModel(
            "llama.cpp does not finish a text like this tokenizer",
            where=where,
            expected="ByteLevel, and one TemplateProcessing at most",
            got=_kinds(steps),
            hint=_HINT,
        )
    sides: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in single:
        if isinstance(piece, Mapping) and "Sequence" in piece:
            texts += 1
        else:
            sides[min(texts, 1)].extend(_special_piece(piece, special, where))
    if texts != 1:
        raise MalformedFile("a template of one text has another number of them", where=where, got=texts)
    return sides


def normalises_text(tokenizer: Mapping[str, object], where: object) -> bool:
    """Tell whether byte-level BPE brings a text into NFC first, which llama.cpp does not.

    Raises:
        UnsupportedModel: It changes the text in another way.
    """
    steps = _steps(tokenizer, "normalizer")
    if any(step.get("type") != "NFC" for step in steps):
        raise _cannot_normalise(where, "none or NFC", steps)
    return bool(steps)


def prefixes_space(tokenizer: Mapping[str, object], merges: bool, where: object) -> bool:
    """Tell whether a SentencePiece tokenizer puts a space before every stretch of text, or before none.

    The forms that llama.cpp's treatment equals: the normalisers Prepend and Replace, Replace alone, or the
    pre-tokenizer Metaspace with ``prepend_scheme`` never. Its other schemes look at what the text begins
    with, and ``first``, which transformers 5 writes, at where it stands.

    Args:
        tokenizer: The parsed file.
        merges: Whether pieces hold a space behind their first character: then it matters if Metaspace splits.
        where: Its path, for messages.

    Raises:
        UnsupportedModel: Neither.
    """
    normalizers, splitters = _steps(tokenizer, "normalizer"), _steps(tokenizer, "pre_tokenizer")
    if not normalizers:
        return _metaspace(splitters, merges, where)
    if splitters:
        raise _cannot_split(where, "none, as there is a normaliser", _kinds(splitters))
    known: dict[str, _Step] = {
        "Prepend": {"prepend": _SPACE},
        "Replace": {"pattern": {"String": " "}, "content": _SPACE},
    }
    plain = all(
        {"type": step.get("type"), **known.get(str(step.get("type")), {})} == dict(step)
        for step in normalizers
    )
    kinds = sorted(_kinds(normalizers))
    if not plain or kinds not in (["Replace"], ["Prepend", "Replace"]):
        raise _cannot_normalise(where, f"Prepend({_SPACE}), Replace(' ' by {_SPACE})", normalizers)
    return len(kinds) == 2


def _metaspace(splitters: list[_Step], merges: bool, where: object) -> bool:
    """Check that spaces become ▁ and nothing else happens; return False: no prefix."""
    step = splitters[0] if len(splitters) == 1 else {}
    scheme = "never" if step.get("add_prefix_space") is False else step.get("prepend_scheme", "always")
    got = {"type": step.get("type"), "replacement": step.get("replacement"), "prepend_scheme": scheme}
    expected = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never"}
    if got != expected:
        hint = _REWRITTEN if got == {**expected, "prepend_scheme": "first"} else _HINT
        raise _cannot_split(where, expected, got if step else _kinds(splitters), hint)
    if merges and step.get("split", True):
        raise _cannot_split(where, "split false, as there are pieces with a space inside", "split true")
    return False


def _special_piece(piece: object, special: Mapping[str, object], where: str) -> list[int]:
    """Return the ids of a special token of a template."""
    token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
    name = token.get("id") if isinstance(token, Mapping) else None
    entry = special.get(name) if isinstance(name, str) else None
    ids = entry.get("ids") if isinstance(entry, Mapping) else None
    if not isinstance(ids, list) or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise MalformedFile("a template without its tokens", where=where, got=repr(piece)[:80])
    return ids


#: The key under which a sequence of each component has its steps.
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def _steps(tokenizer: Mapping[str, object], component: str) -> list[_Step]:
    """Return the steps of a component that may be one, a sequence of them, or none."""
    return list(_flat(tokenizer.get(component), _PARTS[component]))


def _flat(node: object, key: str) -> Iterator[_Step]:
    if node is None:
        return
    children = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping):
        yield {"type": repr(node)[:20]}
    elif node.get("type") == "Sequence" and isinstance(children, list):
        for child in children:
            yield from _flat(child, key)
    else:
        yield node


def _kinds(steps: list[_Step]) -> list[str]:
    return [str(step.get("type")) for step in steps]


def _cannot_normalise(where: object, expected: str, got: list[_Step]) -> UnsupportedModel:
    return UnsupportedModel(
        "llama.cpp cannot normalise text like this tokenizer",
        where=f"{where}: normalizer",
        expected=expected,
        got=str([dict(step) for step in got])[:200],
        hint=_HINT,
    )


def _cannot_split(where: object, expected: object, got: object, hint: str = _HINT) -> UnsupportedModel:
    return UnsupportedModel(
        "llama.cpp cannot treat spaces like this tokenizer",
        where=f"{where}: pre_tokenizer",
        expected=expected,
        got=got,
        hint=hint,
    )
