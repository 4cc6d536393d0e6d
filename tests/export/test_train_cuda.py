"""``train`` on a model in floating point and ``calibrate``, on a GPU: what they store against a CPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from icq_oracle import in_torch
from tolerance import CALIBRATED_CODES, IMPORTANCE_BFLOAT16

import irq_export
from irq_export.calibrate import read_importance
from irq_export.cli import main
from irq_formats.checkpoint import Checkpoint, open_checkpoint

if not torch.cuda.is_available():
    pytest.skip("training on a GPU needs CUDA, and there is none here", allow_module_level=True)

DEMO = Path(irq_export.__file__).parent / "demo_model"
STORY = (
    "Once upon a time there lived a little girl in a house at the foot of a mountain. Every morning she went "
    "into the forest to look for wood, and every evening she came home and told her grandfather what she had "
    "seen. "
)


def invoke(*args: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data of some 8,000 tokens, and a text beside it."""
    path = tmp_path_factory.mktemp("cuda") / "data.json"
    rows = [{"instruction": f"Tell story {i}.", "output": STORY * (1 + i % 2)} for i in range(64)]
    path.write_text(json.dumps(rows))
    path.with_name("text.txt").write_text(STORY * 96)
    return path


def trained(data: Path, output: Path, *more: object) -> Checkpoint:
    """The directory of a run of three steps, on the GPU from the first to the last."""
    recipe = ["--device", "cuda", "--steps", "3", "--log-every", "1", "--rank", "8", "--batch-size", "8"]
    report = invoke("train", DEMO, "--data", data, "-o", output, *recipe, *more)["train"]
    assert report["peak_bytes"] > 0
    assert report["betas"] > 0
    return open_checkpoint(output)


@pytest.mark.parametrize(
    "options",
    [
        *(["--codebook", codebook, "--icq"] for codebook in ("nf4", "nf3", "nf2", "int4", "int3", "int2")),
        ["--codebook", "nf4"],  # plain and refit
    ],
    ids=" ".join,
)
def test_the_search_inside_train_is_that_of_a_cpu(options: list[str], data: Path, tmp_path: Path) -> None:
    ours = trained(data, tmp_path / "run", *options, "--importance", "none")
    with in_torch():
        invoke("quantize", DEMO, "-o", tmp_path / "cpu", *options, "--device", "cpu")
    assert ours.base_hash == open_checkpoint(tmp_path / "cpu").base_hash  # of every bit of every tensor
    assert len(ours.blocks) == 28


def test_qlora_inside_train_is_that_of_a_cpu(data: Path, tmp_path: Path) -> None:
    """--no-icq stores what bitsandbytes would: the reference arithmetic."""
    for device in ("cuda", "cpu"):
        recipe = ["--no-icq", "--steps", "1", "--rank", "4", "--device", device]
        invoke("train", DEMO, "--data", data, "-o", tmp_path / device, *recipe)
    found = [open_checkpoint(tmp_path / device).base_hash for device in ("cuda", "cpu")]
    assert found[0] == found[1]


def test_importance_measured_on_a_gpu(data: Path, tmp_path: Path) -> None:
    """In bf16 there, in float32 on a CPU; a fit to the same importance is the same but for rare codes."""
    for device in ("cuda", "cpu"):
        where = ["-o", tmp_path / f"{device}.importance", "--device", device]
        invoke("calibrate", DEMO, data.with_name("text.txt"), *where, "--windows", "8")
    found, expected = (read_importance(tmp_path / f"{d}.importance") for d in ("cuda", "cpu"))
    assert found.tokens == expected.tokens == 4096
    assert found.moments.keys() == expected.moments.keys()
    for name, moments in expected.moments.items():
        assert (found.of(name) - moments).abs().sum() <= IMPORTANCE_BFLOAT16 * moments.sum()
    ours = trained(data, tmp_path / "run", "--importance", tmp_path / "cpu.importance")
    fitted = ["--importance", tmp_path / "cpu.importance", "--device", "cpu"]
    invoke("quantize", DEMO, "-o", tmp_path / "fitted", *fitted)
    theirs = open_checkpoint(tmp_path / "fitted")
    for name in theirs.blocks:
        equal = ours.block_tensor(name).codes() == theirs.block_tensor(name).codes()
        assert np.mean(equal) >= CALIBRATED_CODES, name


def test_importance_is_measured_on_the_training_data(data: Path, tmp_path: Path) -> None:
    """By default, and the same twice."""
    runs = [trained(data, tmp_path / name) for name in ("first", "second")]
    for run in runs:
        search = run.quantization.search
        assert search["importance"] is True
        assert search["tokens"] >= 4096  # type: ignore[operator]
    assert runs[0].base_hash == runs[1].base_hash


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_one_process_is_one_gpu(data: Path, tmp_path: Path) -> None:
    """Where several are seen, transformers would make every batch so many times larger."""
    recipe = ["--epochs", "1", "--batch-size", "8", "--rank", "4", "--importance", "none"]
    report = invoke("train", DEMO, "--data", data, "-o", tmp_path / "run", *recipe)["train"]
    assert report["steps"] == 64 // 8
