"""The commands of docs/run.md run as they stand, on the demo model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from irq_export.cli import main


def test_commands(repo: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = re.findall(r"```sh\n(.*?)```", (repo / "docs" / "run.md").read_text(), re.DOTALL)
    lines = [line.partition("  #")[0].removeprefix("irq-export ") for line in block.splitlines()]
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "hub.gguf"):
        shutil.copy(demo, name)
    Path("text.txt").write_text("Once upon a time there was a cat. The cat had a big red ball. " * 40)
    (tmp_path / "HF_DIR").symlink_to(repo / "irq_export" / "demo_model")
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line))
        assert result.exit_code == 0, f"irq-export {line}\n{result.output}"
