"""Two exports of the demo model: one of ours, and a stock pair."""

from __future__ import annotations

from pathlib import Path

import pytest
from verified import Case, make


@pytest.fixture(scope="session")
def irq(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(repo, tmp_path_factory.mktemp("irq"), "nf4", "irq")


@pytest.fixture(scope="session")
def pair(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(repo, tmp_path_factory.mktemp("pair"), "int4", "stock")
