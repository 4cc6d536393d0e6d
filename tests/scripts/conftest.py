"""The scripts import each other by name, as when one of them is run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    monkeypatch.syspath_prepend(str(repo / "scripts"))


@pytest.fixture(scope="session")
def demo(repo: Path) -> Path:
    return repo / "irq_export" / "demo_model"
