"""What a safetensors tensor is: dtypes, and the name, shape and place of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["DTYPES", "MAX_HEADER_BYTES", "METADATA_KEY", "TensorRef", "TensorSpec"]

MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"

DTYPES: dict[str, np.dtype[np.generic]] = {  # numpy type of the raw data
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is: name, dtype (a key of ``DTYPES``) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorRef(TensorSpec):
    """Where a tensor lies.

    Attributes:
        offset: Absolute offset in its file, bytes.
        shard: Index into ``SafeTensors.files``.
    """

    offset: int = 0
    shard: int = 0
