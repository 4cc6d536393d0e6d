"""``scripts/bench_fidelity.py`` runs, and keeps rows of its own model and text alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("xllamacpp")


def test_page_of_the_demo_model(demo: Path, repo: Path, tmp_path: Path) -> None:
    from bench_fidelity import main

    text, work = repo / "README.md", tmp_path / "work"
    options = ["--windows", "1", "--llama-windows", "1", "--length", "8", "--name", "demo"]
    command = [str(demo), str(text), "--work", str(work), *options]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (work / "fidelity.md").read_text("utf-8")
    assert "README.md --work DIR --name demo`" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 16  # heads and fifteen deployments
    assert rows[1][4] == rows[2][4] == "100.0%"  # the trained model, and our file of it

    other = tmp_path / "other.txt"
    other.write_text("Another text.")
    refused = CliRunner().invoke(main, [command[0], str(other), *command[2:]])
    assert refused.exit_code == 2
    assert "another model, text" in refused.output
