"""Hypothesis strategies and helpers for GGUF files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from irq_formats.gguf import STR, GgmlType, GgufFile, GgufValue, TensorSource, ValueType, write_gguf

SCALARS = [kind for kind in ValueType if kind not in (ValueType.STR, ValueType.ARRAY)]
ARCHITECTURE = {"general.architecture": STR("test")}

texts = st.text(max_size=12)


def scalar(kind: ValueType) -> st.SearchStrategy[GgufValue]:
    return hnp.from_dtype(kind.dtype).map(lambda value: kind(value.item()))


def array(kind: ValueType) -> st.SearchStrategy[GgufValue]:
    return hnp.arrays(kind.dtype, st.integers(0, 9)).map(kind.array)


values = st.one_of(
    texts.map(STR),
    st.lists(texts, max_size=5).map(STR.array),
    st.sampled_from(SCALARS).flatmap(scalar),
    st.sampled_from(SCALARS).flatmap(array),
)
keys = st.from_regex(r"[a-z][a-z0-9_.\-]{0,20}", fullmatch=True).filter(
    lambda k: not k.startswith("general.")
)
metadata = st.dictionaries(keys, values, max_size=6)


def source(name: str, shape: tuple[int, ...], kind: GgmlType, seed: int = 0) -> TensorSource:
    """A tensor of random bytes: any bytes are a tensor of any type."""
    raw_shape = kind.raw_shape(shape)
    nbytes = math.prod(raw_shape) * kind.dtype.itemsize
    raw = hashlib.shake_128(bytes([seed])).digest(nbytes)
    data = np.frombuffer(raw, kind.dtype).reshape(raw_shape)
    return TensorSource(name, shape, kind, lambda: data)


@st.composite
def sources(draw: st.DrawFn) -> list[TensorSource]:
    names = draw(st.lists(st.from_regex(r"[a-z0-9._]{1,63}", fullmatch=True), max_size=5, unique=True))
    found = []
    for seed, name in enumerate(names):
        kind = draw(st.sampled_from(list(GgmlType)))
        leading = draw(st.lists(st.integers(1, 4), max_size=3))
        shape = (*leading, kind.block_size * draw(st.integers(1, 3)))
        found.append(source(name, shape, kind, seed))
    return found


def same_value(a: GgufValue, b: GgufValue) -> bool:
    if (a.type, a.element) != (b.type, b.element):
        return False
    if isinstance(a.value, np.ndarray) and isinstance(b.value, np.ndarray):
        return (a.value.dtype, a.value.tobytes()) == (b.value.dtype, b.value.tobytes())
    both_nan = a.value != a.value and b.value != b.value
    return both_nan or (type(a.value) is type(b.value) and a.value == b.value)


def rewrite(file: GgufFile, path: Path) -> None:
    """Write what was read."""
    tensors = [
        TensorSource(t.name, t.shape, t.type, lambda name=t.name: file.read(name))
        for t in file.tensors.values()
    ]
    write_gguf(path, file.values, tensors, overwrite=True)
