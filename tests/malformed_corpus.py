"""Opening the cases of formats/vectors/malformed, each by the check that must refuse it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from irq_formats.gguf import open_gguf
from irq_formats.gguf.irq_check import check_irq
from irq_formats.gguf.model_keys import read_model
from irq_formats.onnx.model_file import open_model
from irq_formats.safetensors_io import open_safetensors, open_sharded

CORPUS = Path(__file__).resolve().parents[1] / "formats" / "vectors" / "malformed"


@dataclass(frozen=True)
class Case:
    """An entry of cases.json (scripts/malformed.py explains the fields)."""

    name: str
    kind: str
    level: str
    file: str
    rule: str
    message: str


def load_cases(kind: str | None = None, level: str | None = None) -> list[Case]:
    entries = json.loads((CORPUS / "cases.json").read_text(encoding="utf-8"))
    cases = [Case(**entry) for entry in entries]
    return [c for c in cases if kind in (None, c.kind) and level in (None, c.level)]


def open_case(case: Case) -> object:
    """Open the file as a user's command would; must raise an IrqError."""
    path = CORPUS / case.file
    if case.kind == "onnx":
        return open_model(path)
    if case.kind == "safetensors":
        return open_sharded(path.parent) if path.suffix == ".json" else open_safetensors(path)
    gguf = open_gguf(path)
    if case.level == "payload":
        return check_irq(gguf)
    if case.level == "model":
        return read_model(gguf.metadata, str(gguf.metadata["general.architecture"]), gguf.tensors)
    return gguf
