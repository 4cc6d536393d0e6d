"""to-onnx, when what was written is not what should have been: nothing of it gets the name of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tiny_checkpoints import write_tiny_checkpoint

from irq_export.cli import main
from irq_export.export.onnx import convert, to_onnx
from irq_formats.errors import ParityFailed
from irq_formats.onnx.model_file import open_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "c"
    write_tiny_checkpoint(path)
    return path


Spoil = Callable[[BinaryIO, dict[str, int]], object]


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], None]:
    """Let something happen to the data file, given where its tensors begin, when it has been written."""
    real = convert.write_data

    def spoil(change: Spoil) -> None:
        def write(file, tensors, offsets, **options):
            real(file, tensors, offsets, **options)
            change(file, offsets)

        monkeypatch.setattr(convert, "write_data", write)

    return spoil


def check_rejected(
    checkpoint: Path, tmp_path: Path, match: str, left: Sequence[str] = ("o.rejected",)
) -> None:
    with pytest.raises(ParityFailed, match=match):
        to_onnx(checkpoint, tmp_path / "o")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(left)


@pytest.mark.parametrize("part", ["codes", "scale", "tau"])
def test_a_byte_written_wrong_is_noticed(part, checkpoint, tmp_path, monkeypatch, spoiled):
    def change(file, offsets):
        file.seek(offsets[f"model.layers.1.mlp.up_proj.{part}"] + 4)
        file.write(b"\x01")

    spoiled(change)
    for rejected in (["o.rejected"], ["o.rejected", "o.rejected-2"]):
        check_rejected(checkpoint, tmp_path, f"{rejected[-1]}: .*mlp.up_proj.{part}: the written", rejected)
    run = CliRunner().invoke(main, ["to-onnx", str(checkpoint), "-o", str(tmp_path / "o")])
    assert run.exit_code == ParityFailed.exit_code
    monkeypatch.undo()
    to_onnx(checkpoint, tmp_path / "o")
    spoiled(change)
    with pytest.raises(ParityFailed):
        to_onnx(checkpoint, tmp_path / "o", overwrite=True)
    assert open_model(tmp_path / "o").tensors  # the old one is still there


@pytest.mark.parametrize("name", ["rope.cos", "rope.sin"])
def test_a_table_of_angles_written_wrong_is_noticed(name, checkpoint, tmp_path, spoiled):
    def change(file, offsets):
        file.seek(offsets[name] + 40 * 4)
        file.write(np.array([np.nan], "<f4").tobytes())

    spoiled(change)
    check_rejected(checkpoint, tmp_path, f"{name}: the written table")


def test_a_graph_written_wrong_is_noticed(checkpoint, tmp_path, spoiled):
    """It is well formed: only which model it is has changed."""

    def change(file, offsets):
        path = Path(file.name).with_name("model.onnx")
        path.write_bytes(path.read_bytes().replace(b"irq-export", b"irq-expert"))

    spoiled(change)
    check_rejected(checkpoint, tmp_path, r"model\.producer_name: 'irq-expert' instead of")


def test_a_data_file_written_short_is_rejected(checkpoint, tmp_path, spoiled):
    spoiled(lambda file, offsets: file.truncate(file.tell() - 4))
    check_rejected(checkpoint, tmp_path, "does not fit")


@pytest.mark.parametrize("error", [onnx.checker.ValidationError, onnx.shape_inference.InferenceError])
def test_a_graph_that_onnx_refuses_is_rejected(error, checkpoint, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise error("refused")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    check_rejected(checkpoint, tmp_path, "refused")


def test_what_was_not_compared_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """Ctrl-C while the files are read back."""

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "read_back", interrupt)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(checkpoint, tmp_path / "o")
    assert not list(tmp_path.iterdir())
