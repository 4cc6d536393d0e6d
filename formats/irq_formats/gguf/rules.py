"""The rules that writer and reader share, so that neither can be stricter than the other.

Sources: ggml ``gguf.cpp`` (names under 64 bytes, at most four dimensions, contiguous offsets, sizes),
``docs/gguf.md`` (keys: ASCII, at most 2^16 - 1 bytes; alignment: a multiple of eight), and caps of our
own on what no model needs.
"""

from __future__ import annotations

__all__ = [
    "ALIGNMENT_KEY",
    "ARCHITECTURE_KEY",
    "DEFAULT_ALIGNMENT",
    "MAGIC",
    "MAX_ALIGNMENT",
    "MAX_ARRAY",
    "MAX_DIMS",
    "MAX_KEYS",
    "MAX_KEY_BYTES",
    "MAX_NAME_BYTES",
    "MAX_STRINGS",
    "MAX_STRING_BYTES",
    "MAX_TENSORS",
    "VERSION",
    "alignment_fault",
    "key_fault",
    "name_fault",
    "padding",
]

MAGIC = b"GGUF"
VERSION = 3
ARCHITECTURE_KEY = "general.architecture"
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32  # bytes
MAX_ALIGNMENT = 1 << 20  # bytes
MAX_DIMS = 4
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 63
MAX_STRING_BYTES = 1 << 26  # the largest tokenizer.json seen is 2^25
MAX_ARRAY = 1 << 22  # numbers
MAX_STRINGS = 1 << 21  # in one array; the largest vocabularies have 2^20 tokens


def padding(nbytes: int, alignment: int) -> int:
    """Return the zero bytes that follow ``nbytes`` bytes."""
    return -nbytes % alignment


def key_fault(key: str) -> str | None:
    """Say what is wrong with a metadata key, or None."""
    if not key:
        return "key is empty"
    if len(key) > MAX_KEY_BYTES:
        return f"key is longer than {MAX_KEY_BYTES} bytes"
    if not (key.isascii() and key.isprintable()):
        return "key is not printable ASCII"
    return None


def name_fault(name: str) -> str | None:
    """Say what is wrong with a tensor name, or None."""
    if not name:
        return "tensor name is empty"
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return f"tensor name is longer than {MAX_NAME_BYTES} bytes"
    if not name.isprintable():
        return "tensor name holds unprintable characters"
    return None


def alignment_fault(alignment: object) -> str | None:
    """Say what is wrong with ``general.alignment`` (bytes), or None."""
    if not isinstance(alignment, int) or isinstance(alignment, bool):
        return "alignment is not an integer"
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        return f"alignment is not a power of two from 8 to {MAX_ALIGNMENT}"
    return None
