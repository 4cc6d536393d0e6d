"""The commands and programs of docs/onnx.md run, in order, as they stand, on the demo model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_onnx import nmse
from tolerance import NMSE_FLOAT32

from irq_export.cli import main
from irq_export.iec import random_adapter
from irq_export.quantize_model import quantize
from irq_export.quantizer import load_model
from irq_formats.checkpoint import open_checkpoint
from irq_formats.peft_adapter import write_peft_adapter


def blocks(repo: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repo / "docs" / "onnx.md").read_text(), re.DOTALL)


def test_docs(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    quantize(repo / "irq_export" / "demo_model", "CHECKPOINT", codebook="nf4", refine="none", tie="first")
    base_hash = open_checkpoint("CHECKPOINT").base_hash
    adapter = random_adapter(load_model("CHECKPOINT"), rank=4, seed=1, base_hash=base_hash)
    write_peft_adapter(Path("ADAPTER"), adapter, base_model_name="CHECKPOINT")
    (commands,) = blocks(repo, "sh")
    for line in commands.splitlines():
        found = CliRunner().invoke(main, shlex.split(line)[1:])
        assert found.exit_code == 0, found.output

    run, swap, genai = blocks(repo, "python")
    names: dict[str, object] = {}
    exec(run, names)
    expected = load_model("CHECKPOINT")(_tensor([[1, 2, 3]])).logits.detach().numpy()
    assert nmse(names["logits"], expected) <= NMSE_FLOAT32
    exec(swap, names)
    assert nmse(names["adapted"], expected) > 1e4 * NMSE_FLOAT32
    pytest.importorskip("onnxruntime_genai")
    exec(genai, names)
    assert names["text"].lstrip().startswith("Once upon a time")
    assert len(names["text"]) > len("Once upon a time")


def _tensor(ids: list[list[int]]) -> object:
    import torch

    return torch.tensor(ids)
