"""Chat templates: from messages to the text of a prompt, as transformers renders them.

A template is code from somebody else: it runs in jinja2's immutable sandbox, on plain values only, and
whatever it raises becomes an error of ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from irq_formats.errors import MalformedFile, UsageError

__all__ = ["render_template"]


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant says for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render_template(template: str, variables: Mapping[str, object]) -> str:
    """Render a chat template as transformers does: ``tools`` and ``documents`` are None unless given.

    Args:
        template: jinja2 source.
        variables: ``messages`` and the rest, plain values.

    Raises:
        UsageError: The template called ``raise_exception``.
        MalformedFile: Any other failure.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render({"tools": None, "documents": None, **variables})
    except UsageError:
        raise
    except Exception as error:  # anything, recursion and memory included
        raise MalformedFile(
            "the chat template fails",
            where="tokenizer.chat_template",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _refuse(message: str) -> None:
    raise UsageError("the chat template refuses these messages", got=message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
