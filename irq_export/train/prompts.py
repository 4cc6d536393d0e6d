"""From messages to token ids and labels: the model learns the assistant's words and where they end.

The text is rendered once, by the model's chat template or a plain prompt, and tokenised once. What the
assistant says is found as the text that each of its turns adds to the rendered prompt; a token is learnt if
it begins inside such a stretch. Markup that a template puts behind the last special token of a turn (the one
that ends it) is not learnt, as nothing is generated after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irq_export.train.data_formats import Message
from irq_formats.errors import UnsupportedModel, UsageError

__all__ = ["IGNORED", "Example", "choose_prompt", "encode"]

#: Label of a token that is not learnt.
IGNORED = -100

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

#: Formats whose prompt is already all there is to say, without a chat template.
_BARE = ("input-output", "prompt-completion")


@dataclass(frozen=True)
class Example:
    """A tokenised example.

    Attributes:
        ids: Token ids, int32 (n,).
        labels: The same, or :data:`IGNORED`, int32 (n,); not shifted.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    def cut(self, max_length: int) -> Example:
        """Return the first ``max_length`` tokens."""
        return Example(self.ids[:max_length], self.labels[:max_length])

    @property
    def targets(self) -> int:
        """Number of tokens that are learnt; the first of a row never is, as nothing predicts it."""
        return int((self.labels[1:] != IGNORED).sum())


def choose_prompt(tokenizer: Any, data_format: str, wanted: str) -> str:
    """Decide between ``chat``, ``alpaca`` and ``plain``.

    Raises:
        UsageError: A chat is asked for, or needed, and the tokenizer has no template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    needs_chat = data_format in ("messages", "sharegpt", "oasst")
    if wanted == "auto":
        single = "plain" if data_format in _BARE else "alpaca"
        wanted = "chat" if has_template or needs_chat else single
    if wanted == "chat" and not has_template:
        raise UsageError(
            "the model has no chat template",
            hint="Single instructions train without one: --prompt alpaca or --prompt plain",
        )
    return wanted


def encode(tokenizer: Any, messages: Sequence[Message], prompt: str) -> Example:
    """Tokenise a conversation.

    Args:
        tokenizer: A fast tokenizer of transformers.
        messages: Role and content, in order.
        prompt: ``chat``, ``alpaca`` or ``plain``.

    Raises:
        UnsupportedModel: The chat template fails, or rewrites earlier turns.
        UsageError: Several turns without a chat template.
    """
    if prompt == "chat":
        text, spans = _render_chat(tokenizer, messages)
    else:
        text, spans = _render_pair(messages, prompt)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int32)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    labels = np.full(len(ids), IGNORED, np.int32)
    special = np.isin(ids, _special_ids(tokenizer))
    for first, last in spans:
        inside = np.flatnonzero((starts >= first) & (starts < last))
        if ends := special[inside].nonzero()[0].tolist():
            inside = inside[: ends[-1] + 1]
        labels[inside] = ids[inside]
    if prompt != "chat" or not special[labels != IGNORED].any():
        ids, labels = (np.append(values, np.int32(_eos(tokenizer))) for values in (ids, labels))
    if prompt != "chat" and (bos := _leading_bos(tokenizer)) is not None:
        ids = np.insert(ids, 0, bos)
        labels = np.insert(labels, 0, IGNORED)
    return Example(ids, labels)


def _render_chat(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return the text and the stretches (begin, end) of what the assistant says."""
    turns = [{"role": message["role"], "content": _content(message)} for message in messages]
    text, spans = "", []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = _template(tokenizer, turns[:i], generate=True)
        answered = _template(tokenizer, turns[: i + 1], generate=False)
        if not asked.startswith(text) or not answered.startswith(asked):
            raise UnsupportedModel(
                "the chat template rewrites earlier turns, so what is learnt is not what is generated",
                expected=repr(asked[-80:]),
                got=repr(answered[max(0, len(asked) - 80) : len(asked)]),
                hint="Split such conversations into single turns, or train with --prompt alpaca",
            )
        spans.append((len(asked), len(answered)))
        text = answered
    return text, spans


def _template(tokenizer: Any, turns: list[Message], *, generate: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except (
        TemplateError,
        ValueError,
    ) as error:  # transformers' own: none of several templates is the default
        raise UnsupportedModel(
            "the chat template refuses the conversation",
            expected="roles it knows",
            got=f"{error} (roles {', '.join(turn['role'] for turn in turns)})",
        ) from error


def _content(message: Message) -> str:
    """Return what a message says, with the context of an instruction below it."""
    context = message.get("context")
    return f"{message['content']}\n\n{context}" if context else message["content"]


def _render_pair(messages: Sequence[Message], prompt: str) -> tuple[str, list[tuple[int, int]]]:
    """Render one question and its answer without a chat template."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise UsageError(
            "a conversation of several turns needs a chat template",
            got=", ".join(message["role"] for message in messages),
            hint="Use --prompt chat with a model that has one",
        )
    user, answer = messages
    if prompt == "alpaca":
        form = _WITH_INPUT if user.get("context") else _WITHOUT_INPUT
        question = form.format(instruction=user["content"], input=user.get("context", ""))
    else:
        question = _content(user)
        question += "" if question.endswith("\n") else "\n"
    text = question + answer["content"]
    return text, [(len(question), len(text))]


def _special_ids(tokenizer: Any) -> list[int]:
    """Tokens that are markup, whether the tokenizer has a name for them or not."""
    added = tokenizer.added_tokens_decoder.items()
    return [*tokenizer.all_special_ids, *(token for token, entry in added if entry.special)]


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end of text", hint="Set eos_token in tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def _leading_bos(tokenizer: Any) -> int | None:
    """Return the token the tokenizer puts before every text, if it does."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and ids and ids[0] == bos else None
