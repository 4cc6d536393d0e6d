"""The tokenizer a file carries: text to tokens and back, and the chat template.

Our exporters store the Hugging Face ``tokenizer.json`` verbatim under ``tokenizer.huggingface.json``;
the ``tokenizers`` library runs it. Stock files of others have none: then it is a file of its own. The chat
template is rendered only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.fields import Fields
from irq_formats.files import read_small
from irq_formats.gguf import GgufFile
from irq_formats.hf_tokenizer import END_TOKENS_KEY, chat_templates, end_ids, special_ids
from irq_formats.strict_json import parse_object

__all__ = ["Tokenizer", "load_tokenizer"]

_JSON = "tokenizer.huggingface.json"
_TEMPLATE = "tokenizer.chat_template"
_MOST_BYTES = 256 << 20  # more than any tokenizer.json has


class Tokenizer:
    """Text to tokens and back.

    Attributes:
        bos: Beginning-of-sequence id, or None.
        stop_tokens: Ids that end a reply: end of sequence, of turn, of message.
        chat_template: jinja2 source, or None.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        *,
        bos: int | None = None,
        stop_tokens: tuple[int, ...] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.bos = bos
        self.stop_tokens = stop_tokens
        self.chat_template = chat_template
        self._model = model
        self._add_bos = add_bos

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the tokens of ``text``.

        Args:
            text: Any text; special tokens in it are recognised.
            add_special: Add what the tokenizer adds around a text (BOS).

        Raises:
            UsageError: The text holds half of a surrogate pair: it came from bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the text is not Unicode", got=error, hint="Is it UTF-8?") from error
        ids: list[int] = self._model.encode(text, add_special_tokens=add_special).ids
        if add_special and self._add_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._model.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_text(self, token: int | None) -> str:
        """Return how a token is written in the vocabulary ("" for None)."""
        return "" if token is None else self._model.id_to_token(token) or ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Render messages (``role``, ``content``) with the file's chat template.

        Args:
            messages: The conversation.
            add_generation_prompt: End where the assistant begins to speak.
            variables: Further ones of the template, plain values, such as Qwen3's ``enable_thinking``.

        Raises:
            UsageError: The file has no template, the template refuses the messages, or a variable has the
                name of one that is set here.
            MalformedFile: The template is broken, or reaches out of its sandbox.
        """
        from irq_runtime.chat_template import render_template

        if self.chat_template is None:
            raise UsageError(
                "the file carries no chat template", hint="Leave --chat out to continue plain text"
            )
        own: dict[str, object] = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.token_text(self.bos),
            "eos_token": self.token_text(self.stop_tokens[0] if self.stop_tokens else None),
        }
        given = dict(variables or {})
        if taken := sorted(own.keys() & given):
            raise UsageError("the chat template's variable cannot be given", got=", ".join(taken))
        return render_template(self.chat_template, {**given, **own})


def load_tokenizer(gguf: GgufFile, source: str | Path | None = None) -> Tokenizer:
    """Return the tokenizer of a file.

    Args:
        gguf: The model.
        source: A ``tokenizer.json`` for a file without one, as stock GGUFs are; or the model's Hugging Face
            directory, which decides about special tokens and the chat template too, where it names any.

    Raises:
        UsageError: The file is an adapter, or ``source`` is not there or another model's.
        UnsupportedModel: Neither the file nor ``source`` has a ``tokenizer.json``.
        MalformedFile: It is not a tokenizer, or an id is outside its vocabulary.
    """
    where = str(gguf.path)
    if Fields(gguf.metadata, where).string("general.type", "model") == "adapter":
        raise UsageError("this file is an adapter, not a model", where=where, hint="Give it as --adapter")
    given = {} if source is None else _read_source(Path(source))
    fields = Fields({**gguf.metadata, **given}, where if source is None else str(source))
    if not fields.has(_JSON):
        raise UnsupportedModel(
            "the file carries no Hugging Face tokenizer",
            where=where,
            expected=f"the key {_JSON}",
            hint="Give run, serve or perplexity the model's tokenizer.json or its Hugging Face directory as "
            "--tokenizer; or put a tokenizer.json into the checkpoint and export it again",
        )
    try:
        model = tokenizers.Tokenizer.from_str(fields.string(_JSON))
    except Exception as error:  # the library raises bare Exception
        raise MalformedFile("not a tokenizer", where=f"{fields.where}: {_JSON}", got=error) from error
    if source is not None:
        _check_same_tokens(model, fields)
    model.no_truncation()
    model.no_padding()
    ids = {
        kind: _token_id(fields, f"tokenizer.ggml.{kind}_token_id", model.get_vocab_size())
        for kind in ("bos", "eos", "eot", "eom")
    }
    ends = [token for kind in ("eos", "eot", "eom") if (token := ids[kind]) is not None]
    more = fields.array(END_TOKENS_KEY, "u").tolist() if fields.has(END_TOKENS_KEY) else []
    for token in more:
        _check_id(token, model.get_vocab_size(), f"{fields.where}: {END_TOKENS_KEY}")
    return Tokenizer(
        model,
        bos=ids["bos"],
        stop_tokens=tuple(dict.fromkeys([*ends, *more])),
        add_bos=fields.boolean("tokenizer.ggml.add_bos_token", False),
        chat_template=fields.string(_TEMPLATE) if fields.has(_TEMPLATE) else None,
    )


def _read_source(path: Path) -> dict[str, object]:
    """Return what a ``tokenizer.json`` or a Hugging Face directory says, as metadata of a GGUF."""
    file = path / "tokenizer.json" if path.is_dir() else path
    data = read_small(file, limit=_MOST_BYTES)
    document = parse_object(data, where=file)
    values: dict[str, object] = {_JSON: data.decode()}
    if path.is_dir():
        values |= {f"tokenizer.ggml.{key}": token for key, token in special_ids(path, document).items()}
        if ends := end_ids(path, document):
            values[END_TOKENS_KEY] = np.array(ends, np.uint32)
        if "default" in (templates := chat_templates(path)):
            values[_TEMPLATE] = templates["default"]
    return values


def _check_same_tokens(model: tokenizers.Tokenizer, fields: Fields) -> None:
    """Refuse a tokenizer most of whose tokens the file, if it lists any, writes otherwise."""
    if not fields.has("tokenizer.ggml.tokens"):
        return
    tokens = fields.strings("tokenizer.ggml.tokens")
    same = sum(model.id_to_token(token) == text for token, text in enumerate(tokens))
    if 2 * same < model.get_vocab_size():
        raise UsageError(
            "the tokenizer is another model's",
            where=fields.where,
            expected=f"the {len(tokens)} tokens that the file lists",
            got=f"{same} of them",
        )


def _token_id(fields: Fields, key: str, size: int) -> int | None:
    if not fields.has(key):
        return None
    token = fields.integer(key)
    _check_id(token, size, f"{fields.where}: {key}")
    return token


def _check_id(token: int, size: int, where: str) -> None:
    if not 0 <= token < size:
        raise MalformedFile(
            "token outside the vocabulary", where=where, expected=f"0 to {size - 1}", got=token
        )
