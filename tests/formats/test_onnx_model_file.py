"""Opening a model: what the graph says about its data file is checked before that is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel, UsageError
from irq_formats.onnx.data_file import DataTensor, data_offsets, write_data
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME, open_model
from irq_formats.onnx.ops import DTYPES

ARRAYS = {
    "small": np.arange(6, dtype=np.float32).reshape(2, 3),
    "large": np.arange(1 << 17, dtype=np.uint8),
    "last": np.arange(4, dtype=np.float16),
}


METADATA = {"irq.version": "1", "irq.profile": "irq", "irq.attention": "gqa", "irq.base_hash": "5e" * 32}


def tensors(arrays: dict[str, np.ndarray]) -> list[DataTensor]:
    return [
        DataTensor(name, array.dtype.name, array.shape, lambda array=array: np.array_split(array, 2))
        for name, array in arrays.items()
    ]


def write_graph(directory: Path, data: list[DataTensor]) -> dict[str, int]:
    """Write a graph of these initializers alone; return their offsets."""
    offsets, _ = data_offsets(data)
    values = []
    for tensor in data:
        dtype, shape, name = DTYPES[tensor.dtype], ir.Shape(tensor.shape), tensor.name
        stored = ir.ExternalTensor(DATA_NAME, offsets[name], tensor.nbytes, dtype, shape=shape, name=name)
        values.append(ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=stored))
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=10, metadata_props=METADATA))
    del proto.graph.value_info[:]
    (directory / MODEL_NAME).write_bytes(proto.SerializeToString())
    return offsets


@pytest.fixture
def model(tmp_path: Path) -> Path:
    offsets = write_graph(tmp_path, tensors(ARRAYS))
    with (tmp_path / DATA_NAME).open("wb") as file:
        write_data(file, tensors(ARRAYS), offsets)
    return tmp_path


def change(directory: Path, name: str, key: str, value: str) -> None:
    """Change one entry of a tensor's external data."""
    proto = onnx.load(directory / MODEL_NAME, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    (directory / MODEL_NAME).write_bytes(proto.SerializeToString())


def test_what_was_written_is_read(model):
    opened = open_model(model)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(opened.read(name), array)
    np.testing.assert_array_equal(opened.read_part("large", 100, 3), ARRAYS["large"][100:103])
    with pytest.raises(MalformedFile):
        opened.read_part("last", 2, 3)
    with pytest.raises(MalformedFile):
        opened.read("nothing")


def test_large_tensors_begin_on_a_page(model):
    opened = open_model(model)
    assert [opened.tensors[name].offset for name in ARRAYS] == [0, 4096, 4096 + (1 << 17)]
    assert (model / DATA_NAME).read_bytes()[24:4096] == bytes(4072)


def test_tensors_beyond_two_gibibytes(tmp_path):
    """Offsets and lengths of more than 31 and 32 bits; the file is sparse."""

    def tensor(name: str, dtype: str, *shape: int) -> DataTensor:
        return DataTensor(name, dtype, shape, list)

    data = [
        tensor("before", "float32", 3),
        tensor("larger than 2 GiB", "uint8", (5 << 29) + 7),
        tensor("empty", "float32", 0, 7),
        tensor("beyond 4 GiB", "float16", 1 << 10, 1 << 20),
        tensor("last", "uint8", 5),
    ]
    offsets = write_graph(tmp_path, data)
    with (tmp_path / DATA_NAME).open("wb") as file:
        file.truncate(offsets["last"] + 5)
        file.seek(offsets["last"])
        file.write(b"abcde")
    opened = open_model(tmp_path)
    assert opened.tensors["larger than 2 GiB"].nbytes > 2**31
    assert opened.tensors["last"].offset > 2**32
    assert opened.read("last").tobytes() == b"abcde"


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:b", "x\0y", "missing"]
)
def test_external_data_stays_in_the_folder(location, model):
    for name in ARRAYS:
        change(model, name, "location", location)
    with pytest.raises(MalformedFile):
        open_model(model)


def test_external_data_is_no_link(model):
    (model / DATA_NAME).rename(model / "elsewhere")
    (model / DATA_NAME).symlink_to("elsewhere")
    with pytest.raises(MalformedFile, match="link"):
        open_model(model)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("last", "offset", "135169"),  # past the end
        ("last", "offset", "9" * 19),
        ("last", "offset", "9" * 4000),
        ("last", "offset", "-1"),
        ("last", "offset", "x"),
        ("last", "offset", "٣"),
        ("last", "length", "7"),
        ("small", "offset", "4100"),  # inside the large one
        ("small", "location", "other"),
        ("small", "key", "offset"),
    ],
)
def test_ranges_are_checked(name, key, value, model):
    if key == "key":
        proto = onnx.load(model / MODEL_NAME, load_external_data=False)
        proto.graph.initializer[0].external_data[1].key = "checksum"
        (model / MODEL_NAME).write_bytes(proto.SerializeToString())
    else:
        change(model, name, key, value)
    with pytest.raises(MalformedFile):
        open_model(model)


def test_a_shorter_data_file_is_refused(model):
    data = (model / DATA_NAME).read_bytes()
    (model / DATA_NAME).write_bytes(data[:-1])
    with pytest.raises(MalformedFile):
        open_model(model)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"GGUF"])
def test_other_files_are_no_models(content, tmp_path):
    (tmp_path / MODEL_NAME).write_bytes(content)
    with pytest.raises(MalformedFile if content else UnsupportedModel):  # an empty message is valid
        open_model(tmp_path)


@pytest.mark.parametrize("version", ["2", "", "one"])
def test_other_versions_are_refused(version, model):
    proto = onnx.load(model / MODEL_NAME, load_external_data=False)
    next(entry for entry in proto.metadata_props if entry.key == "irq.version").value = version
    (model / MODEL_NAME).write_bytes(proto.SerializeToString())
    with pytest.raises(UnsupportedModel):
        open_model(model)


def test_a_missing_model_is_the_callers_mistake(tmp_path):
    with pytest.raises(UsageError):
        open_model(tmp_path)


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float16), np.zeros(2, np.float32)])
def test_a_tensor_that_is_not_what_it_announced_is_a_bug(wrong, tmp_path):
    tensor = DataTensor("t", "float32", (3,), lambda: [wrong])
    offsets, _ = data_offsets([tensor])
    with (tmp_path / "data").open("wb") as file, pytest.raises(IrqError, match="another"):
        write_data(file, [tensor], offsets)
