"""Exports for tests of verify: a checkpoint of the demo model, an adapter for it, and a file of both."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from irq_export.export.gguf import to_gguf
from irq_export.iec import random_adapter
from irq_export.parity.report import ParityReport
from irq_export.quantize_model import quantize
from irq_export.quantizer import load_model
from irq_formats.checkpoint import open_checkpoint
from irq_formats.gguf import GgufValue, TensorSource, open_gguf, write_gguf
from irq_formats.peft_adapter import write_peft_adapter

__all__ = ["Case", "failed", "make", "plain_end_token", "rewritten"]


class Case(NamedTuple):
    checkpoint: Path
    adapter: Path
    exported: Path


def make(repo: Path, work: Path, codebook: str, profile: str) -> Case:
    checkpoint, adapter_dir = work / "checkpoint", work / "adapter"
    quantize(repo / "irq_export" / "demo_model", checkpoint, codebook=codebook, refine="none", tie="first")
    adapter = random_adapter(load_model(checkpoint), seed=1, base_hash=open_checkpoint(checkpoint).base_hash)
    write_peft_adapter(adapter_dir, adapter, base_model_name=str(checkpoint))
    exported = work / ("model.gguf" if profile == "irq" else "pair")
    to_gguf(checkpoint, exported, profile=profile, adapter_dir=adapter_dir)
    return Case(checkpoint, adapter_dir, exported)


def failed(report: ParityReport) -> set[str]:
    return {check.level for check in report.checks if check.passed is False}


def plain_end_token(checkpoint: Path, **more: str) -> None:
    """transformers 5 takes no special token as a table."""
    settings = checkpoint / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "</s>", **more}))


def rewritten(source: Path, target: Path, change: dict[str, GgufValue | None]) -> Path:
    """Copy a GGUF file with some keys set, or taken out."""
    gguf = open_gguf(source)
    values = {key: value for key, value in {**gguf.values, **change}.items() if value is not None}
    sources = [
        TensorSource(t.name, t.shape, t.type, partial(gguf.read, t.name)) for t in gguf.tensors.values()
    ]
    write_gguf(target, values, sources)
    return target
