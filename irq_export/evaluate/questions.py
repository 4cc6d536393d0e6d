"""Questions with choices, and how they become tokens.

The rules are those of EleutherAI's lm-evaluation-harness: a choice is scored as the continuation of a
context; blanks at the end of a context belong to the continuation; context and continuation are encoded
together and cut at the length of the context encoded alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from irq_formats.errors import UsageError

__all__ = ["Encode", "Question", "Request", "encode_pair", "requests_of"]

#: Text to tokens.
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Request:
    """What a scorer is asked: the log-likelihood of one token sequence after another.

    Attributes:
        context: At least one token.
        continuation: At least one token.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise UsageError(
                "a request needs a context and a continuation",
                expected="at least one token each",
                got=(len(self.context), len(self.continuation)),
            )

    def fitted(self, max_length: int) -> Request:
        """Return the request without the oldest tokens that a model of ``max_length`` positions cannot read.

        The last token of the continuation is predicted, not read.

        Raises:
            UsageError: Not even the continuation fits.
        """
        room = max_length + 1 - len(self.continuation)
        if room < 1:
            raise UsageError(
                "a continuation is longer than the model's context",
                expected=f"at most {max_length} tokens",
                got=len(self.continuation),
            )
        if len(self.context) <= room:
            return self
        return Request(self.context[-room:], self.continuation)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        contexts: The text before each choice; mostly the same for all.
        choices: The texts that are scored, without the blank before them.
        gold: Index of the right choice.
        group: What it is averaged with first (an MMLU subject), or empty.
        header: Text before the examples.
        shots: Solved examples that stand between header and context, most dispensable last.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    group: str = ""
    header: str = ""
    shots: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Characters of each choice, the divisors of ``acc_norm``."""
        return tuple(max(1, len(choice)) for choice in self.choices)


def encode_pair(encode: Encode, context: str, continuation: str) -> Request:
    """Encode a context and its continuation, which together are one text."""
    stem = context.rstrip()
    continuation = context[len(stem) :] + continuation
    whole, start = encode(stem + continuation), len(encode(stem))
    return Request(tuple(whole[:start]), tuple(whole[start:]))


def requests_of(question: Question, encode: Encode, max_length: int) -> list[Request]:
    """Return one request a choice; as many examples stay as fit into ``max_length`` tokens."""
    for count in range(len(question.shots), -1, -1):
        head = question.header + "".join(question.shots[:count])
        requests = [
            encode_pair(encode, head + context, f" {choice}")
            for context, choice in zip(question.contexts, question.choices, strict=True)
        ]
        if max(len(r.context) + len(r.continuation) for r in requests) <= max_length:
            break
    return requests
