"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from instruction_sets import ISAS
from model_cases import MODELS
from serving import client_of
from tiny_models import tiny_model
from transformers import PreTrainedModel

from irq_runtime import _native


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every model of tests/model_cases.py in turn."""
    family, options = request.param
    return tiny_model(family, attn_implementation="sdpa", **options)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set of instructions of this machine in turn, in use."""
    before = _native.isa()
    if not _native.set_isa(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    _native.set_isa(before)


@pytest.fixture(scope="session")
def demo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships in the package, in nf4."""
    from irq_export.export.gguf import to_gguf
    from irq_export.quantize_model import quantize

    folder = tmp_path_factory.mktemp("serve")
    quantize(repo / "irq_export" / "demo_model", folder / "checkpoint", icq=True, refine="none")
    to_gguf(folder / "checkpoint", folder / "demo.gguf", profile="irq")
    return folder / "demo.gguf"


@pytest.fixture(scope="module")
def client(demo: Path) -> Iterator[httpx.Client]:
    """A client of a server of the demo model."""
    with client_of(demo) as client:
        yield client
