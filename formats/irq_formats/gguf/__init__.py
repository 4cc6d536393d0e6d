"""GGUF, read strictly and written deterministically, with numpy alone.

``types`` (value and tensor types), ``rules`` (limits both sides keep), ``header`` and ``reader``,
``writer``, ``stock_blocks`` (ggml's own block types).
"""

from __future__ import annotations

from irq_formats.gguf.reader import GgufFile, GgufTensor, open_gguf
from irq_formats.gguf.types import (
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STR,
    U8,
    U16,
    U32,
    U64,
    GgmlType,
    GgufValue,
    ValueType,
)
from irq_formats.gguf.writer import TensorSource, file_bytes, write_gguf, write_gguf_into

__all__ = [
    "BOOL",
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "STR",
    "U8",
    "U16",
    "U32",
    "U64",
    "GgmlType",
    "GgufFile",
    "GgufTensor",
    "GgufValue",
    "TensorSource",
    "ValueType",
    "file_bytes",
    "open_gguf",
    "write_gguf",
    "write_gguf_into",
]
