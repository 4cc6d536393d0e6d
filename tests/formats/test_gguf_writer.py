"""Writing GGUF: read back by us and by the gguf package, deterministic, and nothing wrong gets out."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_strategies import ARCHITECTURE, metadata, rewrite, same_value, source, sources
from hypothesis import HealthCheck, given, settings

from irq_formats.errors import IrqError, OutputExists, UsageError
from irq_formats.gguf import (
    BOOL,
    F32,
    F64,
    I8,
    I32,
    STR,
    U8,
    U16,
    U32,
    U64,
    GgmlType,
    GgufValue,
    TensorSource,
    ValueType,
    file_bytes,
    open_gguf,
    write_gguf,
)

on_disk = settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)

METADATA = {
    "general.architecture": STR("llama"),
    "llama.block_count": U32(2),
    "llama.eps": F32(1e-5),
    "a.f64": F64(0.1),
    "a.u64": U64(2**64 - 1),
    "a.yes": BOOL(True),
    "tokenizer.ggml.tokens": STR.array(["<unk>", "é", ""]),
    "tokenizer.ggml.scores": F32.array([0, -1.5, 2]),
    "tokenizer.ggml.token_type": I32.array([2, 1, 1]),
    "a.flags": BOOL.array([True, False]),
}
TENSORS = [
    source("token_embd.weight", (5, 64), GgmlType.Q8_0, 1),
    source("blk.0.attn_q.weight", (3, 7), GgmlType.F32, 2),  # 84 bytes: padded
    source("blk.0.attn_q.weight.lora_a", (2, 1, 3), GgmlType.BF16, 3),
    source("blk.0.codes", (6, 5), GgmlType.I8, 4),
    source("blk.0.bias", (9,), GgmlType.F16, 5),
]


class TestSecondOpinion:
    """The PyPI gguf package reads the file and finds the same in it."""

    @pytest.fixture
    def reader(self, tmp_path: Path) -> gguf.GGUFReader:
        write_gguf(tmp_path / "x.gguf", METADATA, TENSORS)
        return gguf.GGUFReader(tmp_path / "x.gguf")

    def test_metadata(self, reader: gguf.GGUFReader) -> None:
        found = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert list(found) == list(METADATA)
        for key, value in METADATA.items():
            expected = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
            assert found[key] == expected, key
            kinds = [value.type] if value.element is None else [value.type, value.element]
            assert [int(kind) for kind in reader.fields[key].types] == kinds

    def test_tensors(self, reader: gguf.GGUFReader) -> None:
        assert [t.name for t in reader.tensors] == [t.name for t in TENSORS]
        for theirs, ours in zip(reader.tensors, TENSORS, strict=True):
            assert int(theirs.tensor_type) == ours.type
            assert tuple(theirs.shape.tolist()[::-1]) == ours.shape
            assert theirs.data.tobytes() == ours.load().tobytes()


@on_disk
@given(extra=metadata, tensors=sources())
def test_round_trip(tmp_path: Path, extra: dict[str, GgufValue], tensors: list[TensorSource]) -> None:
    path = tmp_path / "x.gguf"
    given_metadata = ARCHITECTURE | extra
    write_gguf(path, given_metadata, tensors, overwrite=True)
    assert path.stat().st_size == file_bytes(given_metadata, tensors)
    file = open_gguf(path)
    assert list(file.values) == list(given_metadata)
    assert all(same_value(file.values[key], value) for key, value in given_metadata.items())
    assert list(file.tensors) == [t.name for t in tensors]
    for tensor in tensors:
        found = file.tensors[tensor.name]
        assert (found.shape, found.type) == (tensor.shape, tensor.type)
        assert found.offset % 32 == 0
        data = file.read(tensor.name)
        assert (data.dtype, data.shape) == (tensor.type.dtype, tensor.type.raw_shape(tensor.shape))
        assert data.tobytes() == tensor.load().tobytes()
    rewrite(file, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_golden_bytes(tmp_path: Path) -> None:
    """The layout of gguf.h, spelled out once."""
    tensor = TensorSource("t", (1, 2), GgmlType.F32, lambda: np.array([[1, 2]], np.float32))
    write_gguf(tmp_path / "x", {"general.architecture": STR("a"), "k": U8(7)}, [tensor])
    head = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 1, 2)
        + struct.pack("<Q", 20)
        + b"general.architecture"
        + struct.pack("<IQ", 8, 1)
        + b"a"
        + struct.pack("<Q", 1)
        + b"k"
        + struct.pack("<IB", 0, 7)
        + struct.pack("<Q", 1)
        + b"t"
        + struct.pack("<IQQIQ", 2, 2, 1, 0, 0)
    )
    data = struct.pack("<2f", 1, 2)
    assert (tmp_path / "x").read_bytes() == head + bytes(-len(head) % 32) + data + bytes(24)


def test_deterministic(tmp_path: Path) -> None:
    """Twice the same bytes; and the same as on the day this was written."""
    for name in ("a", "b"):
        write_gguf(tmp_path / name, METADATA, TENSORS)
    digest = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert digest == "df2deeec191ea37c87e1fba47ebe91ece3ec4ec85a5f2507856a54f068471375"


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x"
    write_gguf(path, METADATA | {"general.alignment": U32(alignment)}, TENSORS)
    file = open_gguf(path)
    assert all(t.offset % alignment == 0 for t in file.tensors.values())
    assert all(file.read(t.name).tobytes() == t.load().tobytes() for t in TENSORS)
    peer = gguf.GGUFReader(path)
    assert [t.data_offset for t in peer.tensors] == [t.offset for t in file.tensors.values()]


def test_one_tensor_in_memory(tmp_path: Path) -> None:
    shape = (1 << 18,)  # 1 MiB each
    tensors = [
        TensorSource(f"t{i}", shape, GgmlType.F32, lambda: np.ones(shape, np.float32)) for i in range(16)
    ]
    seen: list[tuple[str, int, int]] = []
    tracemalloc.start()
    write_gguf(tmp_path / "x", ARCHITECTURE, tensors, progress=lambda *step: seen.append(step))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20  # a tensor, the write buffer, the header
    size = (tmp_path / "x").stat().st_size
    assert [name for name, _, _ in seen] == [t.name for t in tensors]
    assert seen[-1][1:] == (size, size)


def test_views_and_byte_orders(tmp_path: Path) -> None:
    data = np.arange(12, dtype=">f4").reshape(4, 3).T  # neither contiguous nor little-endian
    write_gguf(tmp_path / "x", ARCHITECTURE, [TensorSource("t", (3, 4), GgmlType.F32, lambda: data)])
    assert np.array_equal(open_gguf(tmp_path / "x").read("t"), data)


def refuses(path: Path, values: dict[str, GgufValue], tensors: list[TensorSource]) -> None:
    with pytest.raises(UsageError):
        write_gguf(path, values, tensors)
    assert list(path.parent.iterdir()) == []


class TestRefusals:
    @pytest.mark.parametrize("key", ["", "k\0", "ké", "k" * 65536, "k\n"])
    def test_keys(self, tmp_path: Path, key: str) -> None:
        refuses(tmp_path / "x", ARCHITECTURE | {key: U8(0)}, [])

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"general.architecture": U32(1)},
            {"general.architecture": STR("")},
            ARCHITECTURE | {"general.alignment": U32(3)},
            ARCHITECTURE | {"general.alignment": U64(32)},
            ARCHITECTURE | {"k": STR("\ud800")},
            ARCHITECTURE | {"k": GgufValue(ValueType.ARRAY, ["x"])},
        ],
    )
    def test_metadata(self, tmp_path: Path, values: dict[str, GgufValue]) -> None:
        refuses(tmp_path / "x", values, [])

    @pytest.mark.parametrize("name", ["", "n" * 64, "é" * 32, "a\0", "A", "a"])
    def test_tensor_names(self, tmp_path: Path, name: str) -> None:
        refuses(
            tmp_path / "x", ARCHITECTURE, [source("a", (1,), GgmlType.F32), source(name, (1,), GgmlType.F32)]
        )

    @pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,) * 5, (-1,)])
    def test_shapes(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        tensor = TensorSource("t", shape, GgmlType.F32, lambda: np.zeros(shape, np.float32))
        refuses(tmp_path / "x", ARCHITECTURE, [tensor])

    def test_row_of_broken_blocks(self, tmp_path: Path) -> None:
        tensor = TensorSource("t", (2, 48), GgmlType.Q4_0, lambda: np.zeros((2, 27), np.uint8))
        refuses(tmp_path / "x", ARCHITECTURE, [tensor])

    @pytest.mark.parametrize(
        "data", [np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32)]
    )
    def test_data_unlike_the_declaration(self, tmp_path: Path, data: np.ndarray) -> None:
        good = source("a", (2,), GgmlType.F32)
        refuses(tmp_path / "x", ARCHITECTURE, [good, TensorSource("t", (2, 3), GgmlType.F32, lambda: data)])

    def test_existing_target(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"old")
        with pytest.raises(OutputExists):
            write_gguf(tmp_path / "x", ARCHITECTURE, [])
        assert (tmp_path / "x").read_bytes() == b"old"

    def test_error_while_loading(self, tmp_path: Path) -> None:
        def fail() -> np.ndarray:
            raise IrqError("source is gone")

        with pytest.raises(IrqError, match="gone"):
            write_gguf(tmp_path / "x", ARCHITECTURE, [TensorSource("t", (1,), GgmlType.F32, fail)])
        assert list(tmp_path.iterdir()) == []


class TestValues:
    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (U8, 256), (U8, -1), (I8, 128), (U16, 2**16), (U32, 2**32), (U32, 1.0), (U32, "1"), (U32, True),
            (U64, 2**64), (U64, -1), (F32, 1e39), (F32, "x"), (F32, True), (F64, None), (BOOL, 1), (STR, 5),
            (STR, b"x"), (ValueType.ARRAY, [1]),
        ],
    )  # fmt: skip
    def test_scalars_that_do_not_fit(self, kind: ValueType, value: object) -> None:
        with pytest.raises(UsageError):
            kind(value)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (U8, [256]), (U8, [-1]), (U32, [1.5]), (U32, [1.0]), (U32, ["1"]), (BOOL, [1]), (STR, [5]),
            (STR, ["a", 5]), (F32, [[1.0]]), (F32, ["x"]), (ValueType.ARRAY, [[1]]),
        ],
    )  # fmt: skip
    def test_arrays_that_do_not_fit(self, kind: ValueType, value: object) -> None:
        with pytest.raises(UsageError):
            kind.array(value)  # type: ignore[arg-type]

    def test_floats_are_rounded_at_once(self) -> None:
        assert F32(0.1).value == float(np.float32(0.1))
        assert F64(0.1).value == 0.1
        assert F32(3).value == 3.0
        assert F32(float("-inf")).value == float("-inf")

    def test_empty_arrays_and_strings_are_written(self, tmp_path: Path) -> None:
        """gguf-py drops them without a word."""
        empty = {"a": STR(""), "b": STR.array([]), "c": I32.array([])}
        write_gguf(tmp_path / "x", ARCHITECTURE | empty, [])
        found = open_gguf(tmp_path / "x").values
        assert all(same_value(found[key], value) for key, value in empty.items())
