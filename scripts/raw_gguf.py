"""GGUF bytes assembled by hand, right or wrong: nothing here checks anything.

A file is a list of small fields (one integer, string or payload each), so that tests can also mutate it
field by field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

Fields = tuple[bytes, ...]

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARRAY, U64, I64, F64 = range(13)
TENSOR_F32, TENSOR_F16, TENSOR_Q4_0, TENSOR_I8 = 0, 1, 2, 24


def u8(value: int) -> bytes:
    return struct.pack("<B", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value % 2**32)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value % 2**64)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def string(text: bytes, length: int | None = None) -> bytes:
    """Length and bytes; the length may lie."""
    return u64(len(text) if length is None else length) + text


def pair(key: bytes, kind: int, payload: bytes, *, key_length: int | None = None) -> Fields:
    return u64(len(key) if key_length is None else key_length), key, u32(kind), payload


def array(element: int, count: int, payload: bytes = b"") -> bytes:
    return u32(element) + u64(count) + payload


def info(
    name: bytes,
    dims: tuple[int, ...],
    kind: int,
    offset: int,
    *,
    name_length: int | None = None,
    n_dims: int | None = None,
) -> Fields:
    """A tensor info; ``dims`` in the file's order, row length first."""
    return (
        u64(len(name) if name_length is None else name_length),
        name,
        u32(len(dims) if n_dims is None else n_dims),
        *map(u64, dims),
        u32(kind),
        u64(offset),
    )


@dataclass(frozen=True)
class RawGguf:
    """All parts of a file; counts are those of the parts unless given.

    Attributes:
        pairs: From :func:`pair`.
        infos: From :func:`info`.
        data: Everything after the header's padding.
        pad_byte: What the header is padded with.
        pad: Whether the header is padded at all.
    """

    pairs: tuple[Fields, ...]
    infos: tuple[Fields, ...] = ()
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_pairs: int | None = None
    alignment: int = 32  # bytes
    pad_byte: bytes = b"\0"
    pad: bool = True

    def fields(self) -> list[bytes]:
        """Return the file as a list of fields."""
        n_tensors = len(self.infos) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        fields = [self.magic, u32(self.version), u64(n_tensors), u64(n_pairs)]
        for part in (*self.pairs, *self.infos):
            fields += part
        padding = -sum(map(len, fields)) % self.alignment if self.pad else 0
        return [*fields, self.pad_byte * padding, self.data]

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return b"".join(self.fields())


ARCHITECTURE = pair(b"general.architecture", STR, string(b"llama"))
A = info(b"a", (8,), TENSOR_F32, 0)  # 32 bytes, no padding
B = info(b"b", (4, 2), TENSOR_F16, 32)  # 16 bytes, 16 of padding
DATA_A = struct.pack("<8f", *range(8))
DATA_B = struct.pack("<8e", *range(8))
PAD_B = bytes(16)

GOOD = RawGguf((ARCHITECTURE,), (A, B), DATA_A + DATA_B + PAD_B)
"""Two tensors and the one required key; opens without complaint."""
