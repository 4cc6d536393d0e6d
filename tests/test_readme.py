"""The commands of the README run, in order, as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from irq_export.cli import main


def commands(repo: Path) -> list[str]:
    """Every line of every sh block, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(arguments: str) -> str:
    result = CliRunner().invoke(main, shlex.split(arguments))
    assert result.exit_code == 0, f"irq-export {arguments}\n{result.output}"
    return result.stdout


def test_first_two_commands(repo: Path) -> None:
    """They are what CI runs; the second is this test run itself."""
    install, tests = commands(repo)[:2]
    assert install == 'pip install -c constraints.txt -e ".[all]" && irq-export demo'
    assert tests == "pytest"
    ci = (repo / ".ci" / "run").read_text()
    assert 'pip install -q -c constraints.txt -e ".[all]"' in ci
    assert ci.rstrip().endswith("pytest")


def test_demo() -> None:
    assert "both files proved equal to the PyTorch model" in run("demo")


def test_five_lines(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model that ships in the package."""
    lines = [line for line in commands(repo)[2:] if line.startswith("irq-export ")]
    assert len(lines) >= 5
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Count to {i}.", "output": "Once upon a time."} for i in range(4)]
    Path("DATA.json").write_text(json.dumps(rows))
    model = repo / "irq_export" / "demo_model"
    for line in lines:
        run(line.removeprefix("irq-export ").replace("MODEL_DIR", str(model)))
