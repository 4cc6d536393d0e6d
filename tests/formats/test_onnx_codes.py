"""Byte orders of ONNX operators: against their definition, bit by bit, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_formats.codebooks import CODEBOOKS
from irq_formats.codecs import block_codec
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.onnx.codes import carrier, codes_shape, from_onnx, to_onnx

#: (codebook, operator, block size)
LAYOUTS = [
    *((book, book, size) for book in ("nf4", "nf3", "nf2", "int4", "int3", "int2") for size in (64, 32)),
    *((book, "int4", size) for book in ("int3", "int2") for size in (64, 32)),
    ("int8", "int8", 32),
]


def element(stored: np.ndarray, operator: str, block_size: int, row: int, i: int) -> int:
    """The code of one element, read as spec/irq-onnx.md, section 2 says."""
    line = stored[row].reshape(-1)
    if operator == "nf4":
        return int(line[i // 2] >> (0 if i % 2 else 4)) & 15
    if operator == "int4":
        return int(line[i // 2] >> (4 if i % 2 else 0)) & 15
    if operator == "int8":
        return int(line[i])
    quarter, in_block = block_size // 4, i % block_size
    block = stored[row, i // block_size]
    low = int(block[in_block % quarter] >> (2 * (in_block // quarter))) & 3
    if CODEBOOKS[operator].bits == 2:
        return low
    return low | (int(block[quarter + in_block // 8] >> (in_block % 8)) & 1) << 2


@pytest.mark.parametrize(("codebook", "operator", "block_size"), LAYOUTS)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), blocks=st.integers(1, 3))
def test_every_element_is_where_the_specification_says(codebook, operator, block_size, seed, rows, blocks):
    bits = CODEBOOKS[codebook].bits
    shape = (rows, blocks * block_size)
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)
    packed = block_codec(codebook, block_size).pack(codes)
    stored = to_onnx(packed, codebook, operator, block_size)
    assert stored.shape == codes_shape(operator, shape, block_size)
    shift = {"int3": 4, "int2": 6}[codebook] if operator != codebook else 0
    for row in range(rows):
        for i in range(shape[1]):
            expected = codes[row, i] ^ 0x80 if codebook == "int8" else codes[row, i] + shift
            assert element(stored, operator, block_size, row, i) == expected
    np.testing.assert_array_equal(from_onnx(stored, codebook, operator, block_size), packed)


def test_golden_vectors(repo: Path):
    vectors = json.loads((repo / "formats/vectors/onnx/codes.json").read_text())
    seen = set()
    for vector in vectors:
        book, operator, size = vector["codebook"], vector["operator"], vector["block_size"]
        codes = np.array([vector["codes"]], np.uint8)
        stored = to_onnx(block_codec(book, size).pack(codes), book, operator, size)
        assert stored.tobytes().hex() == vector["bytes"]
        seen.add((book, operator, size))
    assert seen == set(LAYOUTS)


@pytest.mark.parametrize("codebook", ["int3", "int2"])
def test_a_carried_code_names_the_same_level(codebook):
    book = CODEBOOKS[codebook]
    codes = np.arange(64, dtype=np.uint8)[None] % 2**book.bits
    stored = to_onnx(block_codec(codebook, 64).pack(codes), codebook, "int4", 64)
    carried = [element(stored, "int4", 64, 0, i) for i in range(64)]
    np.testing.assert_array_equal(CODEBOOKS["int4"].levels[carried], book.levels[codes[0]])


def test_a_carried_code_outside_its_codebook_is_refused():
    stored = np.zeros((1, 1, 32), np.uint8)
    with pytest.raises(MalformedFile):
        from_onnx(stored, "int3", "int4", 64)


def test_only_small_integers_are_carried():
    assert [carrier(book) for book in ("nf3", "nf2", "int3", "int2", "int8")] == [
        *("nf3", "nf2", "int4", "int4", "int8")
    ]
    assert carrier("int3", carry=False) == "int3"
    with pytest.raises(UnsupportedModel):
        to_onnx(np.zeros((1, 24), np.uint8), "nf3", "int4", 64)
