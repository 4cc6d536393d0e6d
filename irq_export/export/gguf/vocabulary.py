"""The vocabulary of a ``tokenizer.json`` in the terms of llama.cpp: tokens, types, scores, merges.

Two kinds are understood. Byte-level BPE becomes llama.cpp's ``gpt2`` model, whose merges are carried
as they are. BPE with byte fallback, which is what a SentencePiece BPE model becomes at Hugging Face,
becomes its ``llama`` model, which knows no merges: it joins the neighbours whose joint piece has the
highest score. A score of minus the rank of the merge does the same, provided that every way to
split a piece into two pieces is a merge and that these merges stand together; this is checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.hf_tokenizer import added_tokens

__all__ = ["TokenType", "Vocabulary", "read_vocabulary"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        tokens: Text of every token, by id.
        types: :class:`TokenType` of every token, int32 ``(vocab,)``.
        scores: ``llama`` only: float32 ``(vocab,)``; higher joins first.
        merges: ``gpt2`` only: pairs in order of rank, each "left right".
    """

    model: str
    tokens: list[str]
    types: NDArray[np.int32]
    scores: NDArray[np.float32] | None = None
    merges: list[str] | None = None

    @property
    def has_inner_spaces(self) -> bool:
        """Whether a piece holds SentencePiece's space behind its first character."""
        return any("▁" in self.tokens[i][1:] for i in np.flatnonzero(self.types == TokenType.NORMAL))


def read_vocabulary(tokenizer: Mapping[str, object], vocab_size: int, where: object) -> Vocabulary:
    """Read the vocabulary of a parsed ``tokenizer.json``.

    Ids that the model has but the tokenizer does not become unused tokens ``[PADn]`` (with more brackets
    in front where the tokenizer has such a token).

    Args:
        tokenizer: The parsed file.
        vocab_size: Rows of the model's embedding.
        where: Path of the file, for messages.

    Raises:
        UnsupportedModel: Neither kind of tokenizer, one that llama.cpp would tokenize differently, or
            with ids beyond the embedding.
        MalformedFile: Ids clash, or the structure is another.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping | list):
        raise MalformedFile("no model with a vocabulary", where=where)
    merges = model.get("merges")
    if model.get("type", "BPE") != "BPE" or not isinstance(merges, list):
        raise UnsupportedModel(
            "this kind of tokenizer is not supported in stock files",
            where=f"{where}: model.type",
            expected="BPE",
            got=model.get("type"),
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedModel("llama.cpp has no such option", where=f"{where}: model.{key}")
    sentencepiece = model.get("byte_fallback") is True
    if sentencepiece and model.get("ignore_merges"):
        raise UnsupportedModel(
            "llama.cpp has no such option for SentencePiece", where=f"{where}: model.ignore_merges"
        )
    pieces = _pieces(model["vocab"], where)
    pairs = [_pair(merge, where) for merge in merges]
    tokens, types = _tokens(tokenizer, pieces, vocab_size, where)
    if sentencepiece:
        _mark_sentencepiece(tokens, types, model.get("unk_token"))
        scores = _scores(tokens, types, pairs, where)
        return Vocabulary("llama", tokens, types, scores=scores)
    return Vocabulary("gpt2", tokens, types, merges=[" ".join(pair) for pair in pairs])


def _pieces(vocab: object, where: object) -> dict[str, int]:
    if not isinstance(vocab, Mapping) or not all(type(token_id) is int for token_id in vocab.values()):
        raise MalformedFile("the vocabulary does not map text to ids", where=where)
    return dict(vocab)


def _pair(merge: object, where: object) -> tuple[str, str]:
    """Read a merge in either style of tokenizer.json: "a b" or ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise MalformedFile("not a merge of two pieces", where=where, got=repr(merge)[:80])
    if any(" " in part for part in parts):
        raise UnsupportedModel("a merge holds a space", where=where, got=repr(merge)[:80])
    return parts[0], parts[1]


def _tokens(
    tokenizer: Mapping[str, object], pieces: Mapping[str, int], vocab_size: int, where: object
) -> tuple[list[str], NDArray[np.int32]]:
    """Place every piece and added token at its id."""
    tokens: list[str | None] = [None] * vocab_size
    types = np.full(vocab_size, TokenType.NORMAL, np.int32)
    entries = [(text, token_id, TokenType.NORMAL) for text, token_id in pieces.items()]
    for token in added_tokens(tokenizer, where):
        kind = TokenType.CONTROL if "special" in token.flags else TokenType.USER_DEFINED
        entries.append((token.text, token.token_id, kind))
    for text, token_id, kind in entries:
        if token_id < 0:
            raise MalformedFile("an id is negative", where=where, got=f"{text!r}: {token_id}")
        if token_id >= vocab_size:
            raise UnsupportedModel(
                f"token {text!r} has no row in the embedding",
                where=where,
                expected=f"an id below {vocab_size}",
                got=token_id,
                hint="Resize the embedding before quantising, or take the token out of tokenizer.json",
            )
        if tokens[token_id] not in (None, text):
            raise MalformedFile(
                "two tokens share an id", where=where, got=f"{tokens[token_id]!r}, {text!r}: {token_id}"
            )
        tokens[token_id] = text
        types[token_id] = kind
    given = set(tokens)
    types[[token is None for token in tokens]] = TokenType.UNUSED
    prefix = "[PAD"
    while any(f"{prefix}{i}]" in given for i, token in enumerate(tokens) if token is None):
        prefix = f"[{prefix}"
    return [f"{prefix}{i}]" if token is None else token for i, token in enumerate(tokens)], types


def _mark_sentencepiece(tokens: list[str], types: NDArray[np.int32], unknown: object) -> None:
    for i, token in enumerate(tokens):
        if _BYTE_TOKEN.fullmatch(token):
            types[i] = TokenType.BYTE
        elif token == unknown:
            types[i] = TokenType.UNKNOWN


def _scores(
    tokens: list[str], types: NDArray[np.int32], pairs: list[tuple[str, str]], where: object
) -> NDArray[np.float32]:
    """Return minus the rank of the first merge that makes each piece; 0 for what is never made."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        piece = left + right
        if rank and piece in first and "".join(pairs[rank - 1]) != piece:
            raise _not_sentencepiece(where, f"merges of {piece!r} at ranks {first[piece]} and {rank}")
        first.setdefault(piece, rank)
    known, merges = set(tokens), set(pairs)
    for i in np.flatnonzero(types == TokenType.NORMAL):
        token = tokens[i]
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            # llama.cpp starts from single characters, whether they are tokens or not
            joins = all(len(part) == 1 or part in known for part in pair)
            if joins and pair not in merges:
                raise _not_sentencepiece(where, f"{pair[0]!r} + {pair[1]!r} is no merge")
    return np.array([-first.get(token, 0) for token in tokens], np.float32)


def _not_sentencepiece(where: object, got: str) -> UnsupportedModel:
    return UnsupportedModel(
        "these merges are not those of a SentencePiece model; llama.cpp would tokenize differently",
        where=f"{where}: model.merges",
        got=got,
        hint="Use --profile irq, which carries tokenizer.json itself",
    )
