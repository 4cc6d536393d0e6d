"""Fixtures of the exporters' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gguf_sources import GgufSource

from irq_formats.blocks import BlockSpec


@pytest.fixture(scope="session")
def gguf_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GgufSource]:
    """One source for each codebook, made when first asked for."""
    made: dict[str, GgufSource] = {}

    def get(codebook: str) -> GgufSource:
        if codebook not in made:
            made[codebook] = GgufSource(tmp_path_factory.mktemp(codebook), BlockSpec(codebook))
        return made[codebook]

    return get
