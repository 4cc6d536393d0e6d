"""The one error hierarchy of irq-export.

Every failure a user can cause or meet is an :class:`IrqError`. The class decides the exit code of the
command line (``exit_code``) and the machine-readable ``code`` of ``--json``; the instance says what
happened, where, what was expected, what was found and what to do.
"""

from __future__ import annotations

__all__ = [
    "IrqError",
    "MalformedFile",
    "OutputExists",
    "ParityFailed",
    "PreflightRefused",
    "UnsupportedModel",
    "UsageError",
    "WrongBase",
]


class IrqError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What went wrong, in one sentence.
        where: File, tensor or key concerned.
        expected: What the specification or the caller asked for.
        got: What was found instead.
        hint: What the user can do about it.
    """

    code: str = "internal"
    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)
        self.hint = hint

    def __str__(self) -> str:
        text = self.message if self.where is None else f"{self.where}: {self.message}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.got is not None:
            text += f", got {self.got}" if self.expected is not None else f"; got {self.got}"
        if self.hint is not None:
            text += f". {self.hint}"
        return text

    def to_dict(self) -> dict[str, str]:
        """Return the fields for ``--json`` (schema ``formats/schema/error.schema.json``)."""
        fields = {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "hint": self.hint,
        }
        return {key: value for key, value in fields.items() if value is not None}


class UsageError(IrqError):
    """The call itself is wrong (contradictory or unknown options)."""

    code = "usage"
    exit_code = 2


class MalformedFile(IrqError):
    """A file breaks its specification."""

    code = "malformed_file"
    exit_code = 3


class UnsupportedModel(IrqError):
    """The input is well formed, but this version cannot handle it."""

    code = "unsupported_model"
    exit_code = 3


class WrongBase(IrqError):
    """An adapter was trained against another quantised base."""

    code = "wrong_base"
    exit_code = 3


class ParityFailed(IrqError):
    """An exported file does not compute what the checkpoint computes."""

    code = "parity_failed"
    exit_code = 4


class PreflightRefused(IrqError):
    """Not enough disk or memory to finish; nothing was written."""

    code = "preflight_refused"
    exit_code = 5


class OutputExists(IrqError):
    """The output path exists and ``--force`` was not given."""

    code = "output_exists"
    exit_code = 6
