"""formats/vectors/models: small files that must open and say what the float64 reference said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from irq_runtime.engine import Engine
from irq_runtime.reference import load_model
from irq_runtime.sampling import SamplingParams, generate
from scripts.model_vectors import write_models

VECTORS = Path(__file__).resolve().parents[2] / "formats" / "vectors" / "models"
ENTRIES = json.loads((VECTORS / "models.json").read_text())


@pytest.mark.parametrize("runtime", ["reference", "exact", "fast"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['model']}, {entry['adapter']}")
def test_greedy_tokens(entry: dict[str, Any], runtime: str) -> None:
    """Every codebook, every carrier (Q2_0 too) and both kinds of adapter; fast may tip what is near a tie."""
    adapter = None if entry["adapter"] is None else VECTORS / entry["adapter"]
    if runtime == "reference":
        session = load_model(VECTORS / entry["model"], adapter).session()
    else:
        session = Engine(VECTORS / entry["model"], adapter, mode=runtime).session()
    greedy = list(generate(session, entry["prompt"], SamplingParams(max_tokens=len(entry["greedy"]))))
    count = 1 if runtime == "fast" else len(greedy)
    assert greedy[:count] == entry["greedy"][:count]
    assert entry["margin"] > 0.01  # float32 errors are a thousand times smaller


def test_models_are_what_the_script_writes(tmp_path: Path) -> None:
    assert write_models(tmp_path) == len(ENTRIES)
    for path in VECTORS.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
