"""Malformed ONNX models that are no files of a repository, and the model that all cases start from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from irq_formats.errors import MalformedFile
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME, open_model
from scripts.malformed_onnx import K, N, well_formed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The sound model, alone in a folder."""
    proto, data = well_formed()
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / MODEL_NAME).write_bytes(proto.SerializeToString())
    (inside / DATA_NAME).write_bytes(data)
    return inside


def test_what_the_cases_start_from_is_sound(folder: Path) -> None:
    """Else every case would be refused for a fault they share; and onnxruntime runs it."""
    opened = open_model(folder)
    session = onnxruntime.InferenceSession(str(opened.path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"A": np.ones((2, K), np.float32)})
    assert y.shape == (2, N)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("target", ["inside", "outside", "nowhere"])
def test_data_is_no_symbolic_link(folder: Path, target: str) -> None:
    other = {"inside": folder / "other", "outside": folder.parent / "other"}.get(target, folder / "nothing")
    if target != "nowhere":
        other.write_bytes((folder / DATA_NAME).read_bytes())
    (folder / DATA_NAME).unlink()
    (folder / DATA_NAME).symlink_to(other)
    with pytest.raises(MalformedFile, match="is a link"):
        open_model(folder)


@pytest.mark.parametrize("name", [DATA_NAME, MODEL_NAME])
def test_files_have_no_second_name(folder: Path, name: str) -> None:
    """A hard link to a secret cannot be told from the file by its path."""
    os.link(folder / name, folder.parent / "secret")
    with pytest.raises(MalformedFile, match="is a link"):
        open_model(folder)


def test_a_linked_model_is_refused(folder: Path) -> None:
    """onnxruntime would look for the data beside the target of the link, we beside the link."""
    (folder.parent / MODEL_NAME).symlink_to(folder / MODEL_NAME)
    (folder.parent / DATA_NAME).write_bytes((folder / DATA_NAME).read_bytes())
    with pytest.raises(MalformedFile, match="is a link"):
        open_model(folder.parent)


@pytest.mark.parametrize("name", [DATA_NAME, MODEL_NAME])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.timeout(10)  # a pipe must not be waited for
def test_only_regular_files_are_read(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)
    with pytest.raises(MalformedFile, match="not a regular file"):
        open_model(folder / MODEL_NAME if kind == "pipe" or name == DATA_NAME else folder)


def test_a_graph_of_more_than_eight_megabytes_is_not_read(folder: Path) -> None:
    with (folder / MODEL_NAME).open("r+b") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(MalformedFile, match="too large"):
        open_model(folder)


def test_data_that_shrinks_later_is_noticed(folder: Path) -> None:
    opened = open_model(folder)
    os.truncate(folder / DATA_NAME, 8)
    with pytest.raises(MalformedFile, match="changed"):
        opened.read("linear.codes")
