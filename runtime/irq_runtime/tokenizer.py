"""The tokenizer a file carries: text to tokens and back, and the chat template.

Our exporters store the Hugging Face ``tokenizer.json`` verbatim under ``tokenizer.huggingface.json``;
the ``tokenizers`` library runs it. The chat template is code from somebody else: it is rendered only
when asked for, in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import tokenizers

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.fields import Fields
from irq_formats.gguf import GgufFile

__all__ = ["Tokenizer", "load_tokenizer", "render_template"]


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
        """
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

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages (``role``, ``content``) with the file's chat template.

        Raises:
            UsageError: The file has no template, or the template refuses the messages.
            MalformedFile: The template is broken, or reaches out of its sandbox.
        """
        if self.chat_template is None:
            raise UsageError(
                "the file carries no chat template", hint="Leave --chat out to continue plain text"
            )
        return render_template(
            self.chat_template,
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=self.token_text(self.bos),
            eos_token=self.token_text(self.stop_tokens[0] if self.stop_tokens else None),
        )


def render_template(template: str, **variables: Any) -> str:
    """Render a chat template as transformers does, in jinja2's immutable sandbox.

    Raises:
        UsageError: The template called ``raise_exception``.
        MalformedFile: Any other failure.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise UsageError("the chat template refuses these messages", got=message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(**variables)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise MalformedFile(
            "the chat template fails",
            where="tokenizer.chat_template",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load_tokenizer(gguf: GgufFile) -> Tokenizer:
    """Return the tokenizer of a file.

    Raises:
        UsageError: The file is an adapter.
        UnsupportedModel: The file carries no ``tokenizer.huggingface.json``.
        MalformedFile: It is not a tokenizer, or an id is outside its vocabulary.
    """
    where = str(gguf.path)
    fields = Fields(gguf.metadata, where)
    if fields.string("general.type", "model") == "adapter":
        raise UsageError("this file is an adapter, not a model", where=where, hint="Give it as --adapter")
    if not fields.has("tokenizer.huggingface.json"):
        raise UnsupportedModel(
            "the file carries no Hugging Face tokenizer",
            where=where,
            expected="the key tokenizer.huggingface.json",
            hint="Put a tokenizer.json into the checkpoint and export it again",
        )
    try:
        model = tokenizers.Tokenizer.from_str(fields.string("tokenizer.huggingface.json"))
    except Exception as error:  # the library raises bare Exception
        raise MalformedFile(
            "not a tokenizer", where=f"{where}: tokenizer.huggingface.json", got=error
        ) from error
    model.no_truncation()
    model.no_padding()
    ids = {
        kind: _token_id(fields, f"tokenizer.ggml.{kind}_token_id", model.get_vocab_size())
        for kind in ("bos", "eos", "eot", "eom")
    }
    stops = dict.fromkeys(ids[kind] for kind in ("eos", "eot", "eom"))
    template = "tokenizer.chat_template"
    return Tokenizer(
        model,
        bos=ids["bos"],
        stop_tokens=tuple(token for token in stops if token is not None),
        add_bos=fields.boolean("tokenizer.ggml.add_bos_token", False),
        chat_template=fields.string(template) if fields.has(template) else None,
    )


def _token_id(fields: Fields, key: str, size: int) -> int | None:
    if not fields.has(key):
        return None
    token = fields.integer(key)
    if not 0 <= token < size:
        raise MalformedFile(
            "token outside the vocabulary",
            where=f"{fields.where}: {key}",
            expected=f"0 to {size - 1}",
            got=token,
        )
    return token
