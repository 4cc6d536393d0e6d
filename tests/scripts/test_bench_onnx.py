"""``scripts/bench_onnx.py`` runs, and gives every layer of a model weights of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_onnx import VARIANTS, main

    options = ["--sizes", "128", "--threads", "2", "--tokens", "1", "--rounds", "1", "--calls", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_onnx.py", *options, "--json", str(tmp_path / "rows.json")])
    main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert all(row["ms"] > 0 for row in rows)


def test_layers_share_nothing() -> None:
    # onnxruntime keeps one prepared copy of equal weights: they would be measured in cache.
    from bench_onnx import weights

    first, second = (weights("int4", 128, layer) for layer in (0, 1))
    assert all((first[key] != second[key]).any() for key in ("codes", "scale", "tau"))
    assert np.array_equal(first["codes"], weights("int4", 128, 0)["codes"])
