"""Typed access to metadata that somebody else wrote (JSON objects, GGUF key-value pairs).

A missing key, a wrong type or a bool where a number belongs ends in :class:`MalformedFile` that names
the key; nobody downstream needs to look at types again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import MalformedFile

__all__ = ["Fields"]

T = TypeVar("T")

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fields:
    """A mapping read by key and type.

    A default of None makes the key required; a key that holds JSON's ``null`` counts as missing.

    Attributes:
        values: The parsed mapping.
        where: Name of the file or object, for messages.
    """

    values: Mapping[str, object]
    where: str

    def has(self, key: str) -> bool:
        """Tell whether ``key`` is there and not null."""
        return self.values.get(key) is not None

    def _get(self, key: str, default: T | None) -> object:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise MalformedFile("required key missing", where=f"{self.where}: {key}")
            return default
        return value

    def _wrong(self, key: str, expected: str, value: object) -> MalformedFile:
        got = type(value).__name__ if not isinstance(value, float) else repr(value)
        return MalformedFile("wrong type of value", where=f"{self.where}: {key}", expected=expected, got=got)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self._wrong(key, "an integer", value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise self._wrong(key, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._wrong(key, "a finite number", value)
        return number

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Return a bool."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "a bool", value)
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def digest(self, key: str) -> str:
        """Return a SHA-256: 64 lower-case hexadecimal digits."""
        value = self.string(key)
        if _DIGEST.fullmatch(value) is None:
            raise MalformedFile(
                "not a hash",
                where=f"{self.where}: {key}",
                expected="64 lower-case hexadecimal digits",
                got=repr(value[:80]),
            )
        return value

    def strings(self, key: str) -> list[str]:
        """Return an array of strings."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "an array of strings", value)
        return value

    def array(self, key: str, kinds: str) -> NDArray[np.generic]:
        """Return a one-dimensional numeric array.

        Args:
            key: The key.
            kinds: Allowed numpy kinds: ``b`` bool, ``u`` unsigned, ``i`` signed, ``f`` float.
        """
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise self._wrong(key, f"an array of kind {kinds}", value)
        return value
