"""Exports for tests of verify on ONNX: a checkpoint of the demo model, two adapters, and a folder of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from irq_export.export.onnx import to_onnx
from irq_export.iec import random_adapter
from irq_export.parity.report import ParityReport
from irq_export.parity.verify import verify
from irq_export.quantize_model import quantize
from irq_export.quantizer import load_model
from irq_formats.checkpoint import open_checkpoint
from irq_formats.manifest import MANIFEST_NAME, write_manifest
from irq_formats.peft_adapter import write_peft_adapter

__all__ = ["QUICK", "Made", "failed", "make", "prove", "seal"]

QUICK = {"positions": 24, "greedy": 6, "threads": 1}


class Made(NamedTuple):
    """A checkpoint, two adapters trained on it, and an export with both."""

    checkpoint: Path
    adapters: list[Path]
    exported: Path


def make(repo: Path, work: Path) -> Made:
    checkpoint = work / "checkpoint"
    quantize(repo / "irq_export" / "demo_model", checkpoint, codebook="nf4", refine="none", tie="first")
    adapters = [work / "first", work / "second"]
    for seed, directory in enumerate(adapters):
        base_hash = open_checkpoint(checkpoint).base_hash
        adapter = random_adapter(load_model(checkpoint), rank=4 + seed, seed=seed, base_hash=base_hash)
        write_peft_adapter(directory, adapter, base_model_name=str(checkpoint))
    to_onnx(checkpoint, work / "exported", adapters=adapters)
    return Made(checkpoint, adapters, work / "exported")


def seal(folder: Path) -> None:
    """Make the manifest fit what was damaged."""
    extra = json.loads((folder / MANIFEST_NAME).read_text())["extra"]
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, extra)


def failed(report: ParityReport) -> set[tuple[str, str]]:
    return {(check.level, check.name) for check in report.checks if check.passed is False}


def prove(made: Made, folder: Path | None = None, runtimes: list[str] | None = None) -> ParityReport:
    return verify(
        folder or made.exported,
        against=made.checkpoint,
        adapter=made.adapters,
        runtimes=["onnxruntime+irq"] if runtimes is None else runtimes,
        **QUICK,
    )
