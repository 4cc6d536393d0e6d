"""GGUF's two type systems: values of the key-value section and tensor types.

A value carries its type, so that what is written is what was meant::

    metadata = {
        "general.architecture": STR("llama"),
        "llama.block_count": U32(30),
        "llama.attention.layer_norm_rms_epsilon": F32(1e-5),
        "tokenizer.ggml.tokens": STR.array(["<unk>", "<s>"]),
    }

Sources: ggml ``gguf.h`` and ``ggml.h`` (type ids), ``ggml-common.h`` (block layouts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from irq_formats.errors import UsageError

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
    "GgufValue",
    "ValueType",
]


class ValueType(IntEnum):
    """Type of a metadata value. Calling a member makes a value: ``ValueType.U32(5)``."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STR = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Little-endian numpy type; BOOL is one byte. STR and ARRAY have none (KeyError)."""
        return _VALUE_DTYPES[self]

    def __call__(self, value: str | int | float | bool) -> GgufValue:
        """Make a scalar value.

        Raises:
            UsageError: The value does not fit the type.
        """
        return GgufValue(self, _checked_scalar(self, value))

    def array(self, values: Sequence[str] | ArrayLike) -> GgufValue:
        """Make an array value whose elements have this type.

        Raises:
            UsageError: An element does not fit the type, or the array is not one-dimensional.
        """
        return GgufValue(ValueType.ARRAY, _checked_array(self, values), self)


@dataclass(frozen=True, eq=False)
class GgufValue:
    """A metadata value with its type.

    Attributes:
        type: The type written to the file.
        value: str, int, float, bool; for arrays list[str] or a one-dimensional numpy array.
        element: Element type of an array, else None.
    """

    type: ValueType
    value: str | int | float | bool | list[str] | NDArray[np.generic]
    element: ValueType | None = None


class GgmlType(IntEnum):
    """Type of a tensor: every id of ggml 0.21 that may stand in a file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42

    @property
    def block_size(self) -> int:
        """Elements of one block; 1 for plain types."""
        return _BLOCKS[self][0] if self in _BLOCKS else 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block; of one element for plain types."""
        return _BLOCKS[self][1] if self in _BLOCKS else self.dtype.itemsize

    @property
    def is_block(self) -> bool:
        """Whether elements are packed in blocks, so that raw data are bytes."""
        return self in _BLOCKS

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Numpy type of the raw data: natural for plain types, uint16 for BF16, bytes for blocks."""
        return _TENSOR_DTYPES.get(self, np.dtype(np.uint8))

    def raw_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the raw data (of type ``dtype``) of a tensor of logical ``shape``.

        Raises:
            UsageError: A row of a block type is not a whole number of blocks.
        """
        if not self.is_block:
            return shape
        if not shape or shape[-1] % self.block_size:
            raise UsageError(
                f"{self.name} needs rows of whole blocks",
                expected=f"a multiple of {self.block_size}",
                got=shape,
            )
        return (*shape[:-1], shape[-1] // self.block_size * self.block_bytes)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of logical ``shape`` (without padding)."""
        return math.prod(self.raw_shape(shape)) * self.dtype.itemsize


_VALUE_DTYPES: dict[ValueType, np.dtype[np.generic]] = {
    ValueType.U8: np.dtype("u1"),
    ValueType.I8: np.dtype("i1"),
    ValueType.U16: np.dtype("<u2"),
    ValueType.I16: np.dtype("<i2"),
    ValueType.U32: np.dtype("<u4"),
    ValueType.I32: np.dtype("<i4"),
    ValueType.F32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.U64: np.dtype("<u8"),
    ValueType.I64: np.dtype("<i8"),
    ValueType.F64: np.dtype("<f8"),
}

_TENSOR_DTYPES: dict[GgmlType, np.dtype[np.generic]] = {
    GgmlType.F32: np.dtype("<f4"),
    GgmlType.F16: np.dtype("<f2"),
    GgmlType.BF16: np.dtype("<u2"),
    GgmlType.F64: np.dtype("<f8"),
    GgmlType.I8: np.dtype("i1"),
    GgmlType.I16: np.dtype("<i2"),
    GgmlType.I32: np.dtype("<i4"),
    GgmlType.I64: np.dtype("<i8"),
}

_BLOCKS: dict[GgmlType, tuple[int, int]] = {  # type: (elements, bytes) of one block
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ2_XXS: (256, 66),
    GgmlType.IQ2_XS: (256, 74),
    GgmlType.IQ3_XXS: (256, 98),
    GgmlType.IQ1_S: (256, 50),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ3_S: (256, 110),
    GgmlType.IQ2_S: (256, 82),
    GgmlType.IQ4_XS: (256, 136),
    GgmlType.IQ1_M: (256, 56),
    GgmlType.TQ1_0: (256, 54),
    GgmlType.TQ2_0: (256, 66),
    GgmlType.MXFP4: (32, 17),
    GgmlType.NVFP4: (64, 36),
    GgmlType.Q1_0: (128, 18),
    GgmlType.Q2_0: (64, 18),
}


def _checked_scalar(type_: ValueType, value: object) -> str | int | float | bool:
    wrong = UsageError(f"not a {type_.name} value", got=repr(value))
    if type_ is ValueType.STR:
        if not isinstance(value, str):
            raise wrong
        return value
    if type_ is ValueType.BOOL:
        if not isinstance(value, (bool, np.bool_)):
            raise wrong
        return bool(value)
    if type_ is ValueType.ARRAY or isinstance(value, (bool, np.bool_)):
        raise wrong
    if type_.dtype.kind == "f":
        if not isinstance(value, (int, float, np.integer, np.floating)):
            raise wrong
        with np.errstate(over="ignore"):
            rounded = float(np.float64(value).astype(type_.dtype))
        if math.isinf(rounded) != math.isinf(value):
            raise wrong
        return rounded
    limits = np.iinfo(str(type_.dtype))
    if not isinstance(value, (int, np.integer)) or not limits.min <= value <= limits.max:
        raise wrong
    return int(value)


def _checked_array(type_: ValueType, values: Sequence[str] | ArrayLike) -> list[str] | NDArray[np.generic]:
    if type_ is ValueType.ARRAY:
        raise UsageError("GGUF readers refuse arrays of arrays")
    if type_ is ValueType.STR:
        strings = [text for text in values if isinstance(text, str)]  # type: ignore[union-attr]
        if len(strings) != len(values):  # type: ignore[arg-type]
            raise UsageError("not an array of strings")
        return strings
    given = np.asarray(values)
    if given.size == 0:
        given = given.astype(type_.dtype)
    kinds = {"b": "b", "f": "iuf"}.get(type_.dtype.kind, "iu")
    wrong = UsageError(f"not an array of {type_.name}", got=f"{given.dtype} {given.shape}")
    if given.ndim != 1 or given.dtype.kind not in kinds:
        raise wrong
    with np.errstate(over="ignore"):
        array = given.astype(type_.dtype)
    if type_.dtype.kind != "f" and not np.array_equal(array, given):
        raise wrong
    return array


U8, I8, U16, I16 = ValueType.U8, ValueType.I8, ValueType.U16, ValueType.I16
U32, I32, U64, I64 = ValueType.U32, ValueType.I32, ValueType.U64, ValueType.I64
F32, F64, BOOL, STR = ValueType.F32, ValueType.F64, ValueType.BOOL, ValueType.STR
