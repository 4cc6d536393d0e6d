"""``scripts/plot_training.py`` draws, and explains itself without matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


def test_help_needs_no_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from plot_training import main

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "metrics.jsonl" in capsys.readouterr().out


def test_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plot_training import main

    entries = [{"step": step, "loss": 3.0 / step} for step in range(1, 30)] + [{"step": 29, "eval_loss": 1.0}]
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "curve.png"
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    main([str(metrics), str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
