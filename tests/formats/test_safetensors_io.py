"""safetensors: our files open in the reference implementation, its files in ours, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from irq_formats.atomic import atomic_file
from irq_formats.errors import MalformedFile, OutputExists, UnsupportedModel, UsageError
from irq_formats.safetensors_io import (
    DTYPES,
    INDEX_NAME,
    SafeTensorsWriter,
    TensorSpec,
    open_safetensors,
    open_sharded,
    write_safetensors,
)

NUMPY = sorted(name for name in DTYPES if not name.startswith(("F8", "BF")))

arrays = st.sampled_from(NUMPY).flatmap(
    lambda name: hnp.arrays(DTYPES[name], hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)
files = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable()), arrays, max_size=5)
strings = st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3)
on_disk = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@on_disk
@given(tensors=files, metadata=strings)
def test_round_trip_through_both_readers(
    tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, metadata, overwrite=True)
    ours = open_safetensors(path)
    assert ours.metadata == metadata
    assert ours.tensors.keys() == tensors.keys()
    theirs = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata
    for name, data in tensors.items():
        assert same(ours.read(name), data)
        assert same(theirs[name], data)
        assert ours.tensors[name].offset % data.dtype.itemsize == 0  # aligned to its items


@on_disk
@given(tensors=files)
def test_reads_what_the_reference_writes(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    path = tmp_path / "y.safetensors"
    safetensors.numpy.save_file(tensors, path, {"format": "np"})
    ours = open_safetensors(path)
    assert ours.metadata == {"format": "np"}
    assert all(same(ours.read(name), data) for name, data in tensors.items())


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "U8", (3,)), TensorSpec("b", "F32", (2,)), TensorSpec("c", "BF16", (1, 2))]
    data = {
        "a": np.array([1, 2, 3], np.uint8),
        "b": np.array([1, -1], np.float32),
        "c": np.array([[0x3F80, 0xC000]], np.uint16),
    }
    for order in ("abc", "cba"):
        with (
            atomic_file(tmp_path / order) as file,
            SafeTensorsWriter(file, specs, {"z": "1", "a": "2"}) as writer,
        ):
            for name in order:
                writer.write(name, data[name])
    assert (tmp_path / "abc").read_bytes() == (tmp_path / "cba").read_bytes()
    opened = open_safetensors(tmp_path / "abc")
    assert np.array_equal(opened.read_f32("c"), [[1.0, -2.0]])
    assert opened.tensors["c"].dtype == "BF16"


def test_read_f32(tmp_path: Path) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    write_safetensors(tmp_path / "x", {"h": halves, "d": np.array([0.1, 1e300]), "i": np.arange(3)})
    file = open_safetensors(tmp_path / "x")
    with np.errstate(invalid="ignore"):
        assert np.array_equal(file.read_f32("h"), halves.astype(np.float32), equal_nan=True)
    assert np.array_equal(file.read_f32("d"), np.array([np.float32(0.1), np.inf], np.float32))
    with pytest.raises(UnsupportedModel, match="not floating point"):
        file.read_f32("i")
    with pytest.raises(UsageError, match="no such tensor"):
        file.read("none")


class TestWriter:
    def test_every_declared_tensor_once(self, tmp_path: Path) -> None:
        spec = TensorSpec("a", "F32", (2,))
        zeros = np.zeros(2, np.float32)
        with (tmp_path / "x").open("wb") as file:
            writer = SafeTensorsWriter(file, [spec])
            with pytest.raises(UsageError, match="were not written"):
                writer.close()
            for wrong in (zeros.astype(np.float64), np.zeros(3, np.float32)):
                with pytest.raises(UsageError, match="do not match"):
                    SafeTensorsWriter(file, [spec]).write("a", wrong)
            writer.write("a", zeros)
            for name in ("a", "b"):
                with pytest.raises(UsageError, match="not declared, or already written"):
                    writer.write(name, zeros)
            writer.close()

    @pytest.mark.parametrize(
        "specs",
        [
            [TensorSpec("a", "F32", (1,)), TensorSpec("a", "F32", (1,))],
            [TensorSpec("__metadata__", "F32", (1,))],
            [TensorSpec("a", "F31", (1,))],
            [TensorSpec("a", "F32", (-1,))],
        ],
    )
    def test_refused_declarations(self, tmp_path: Path, specs: list[TensorSpec]) -> None:
        with (tmp_path / "x").open("wb") as file, pytest.raises(UsageError):
            SafeTensorsWriter(file, specs)

    def test_dtype_that_safetensors_has_not(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="dtype"):
            write_safetensors(tmp_path / "x", {"a": np.zeros(1, np.complex128)})
        assert not (tmp_path / "x").exists()

    def test_existing_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").touch()
        with pytest.raises(OutputExists):
            write_safetensors(tmp_path / "x", {})


class TestSharded:
    def fill(self, directory: Path) -> dict[str, np.ndarray]:
        directory.mkdir(parents=True, exist_ok=True)
        data = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.int64)}
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        for name, shard in names.items():
            write_safetensors(directory / shard, {name: data[name]}, {"format": "pt"})
        (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return data

    def test_shards(self, tmp_path: Path) -> None:
        data = self.fill(tmp_path)
        model = open_sharded(tmp_path)
        assert all(same(model.read(name), array) for name, array in data.items())
        assert model.metadata == {"format": "pt"}

    def test_single_file_goes_first(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        write_safetensors(tmp_path / "model.safetensors", {"only": np.zeros(1)})
        assert list(open_sharded(tmp_path).tensors) == ["only"]

    def test_hub_cache_links(self, tmp_path: Path) -> None:
        """The hub's cache links snapshots/REV/NAME to blobs/HASH."""
        snapshot = tmp_path / "snapshots" / "abc"
        self.fill(snapshot)
        (tmp_path / "blobs").mkdir()
        for number, shard in enumerate(sorted(snapshot.glob("*.safetensors"))):
            shard.rename(tmp_path / "blobs" / str(number))
            shard.symlink_to(Path("../../blobs") / str(number))
        assert sorted(open_sharded(snapshot).tensors) == ["a", "b"]

    def test_link_out_of_the_directory(self, tmp_path: Path) -> None:
        self.fill(tmp_path / "model")
        shard = tmp_path / "model" / "model-00002-of-00002.safetensors"
        shard.rename(tmp_path / "outside.safetensors")
        shard.symlink_to("../outside.safetensors")
        with pytest.raises(MalformedFile, match="leaves the directory"):
            open_sharded(tmp_path / "model")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no model here"):
            open_sharded(tmp_path)
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(UnsupportedModel, match="pickled"):
            open_sharded(tmp_path)


def test_file_that_changes_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(100)})
    file = open_safetensors(path)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 8)
    with pytest.raises(MalformedFile, match="changed"):
        file.read("a")


def test_bool_tensor_with_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.array([True, False])})
    raw = bytearray(path.read_bytes())
    raw[-1] = 7
    path.write_bytes(raw)
    with pytest.raises(MalformedFile, match="not a bool"):
        open_safetensors(path).read("a")


def test_real_file(shared_data: Path) -> None:
    path = shared_data / "models" / "stories260k-fp32" / "hf" / "model.safetensors"
    ours, theirs = open_safetensors(path), safetensors.numpy.load_file(path)
    assert ours.tensors.keys() == theirs.keys()
    assert all(same(ours.read(name), data) for name, data in theirs.items())
