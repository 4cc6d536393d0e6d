"""The constants compiled into the native module equal the numpy specification bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import dynamic_map
from irq_runtime import _native


@pytest.mark.parametrize("name", [name for name in CODEBOOKS if name != "int8"])
def test_header_constants_agree(name: str) -> None:
    np.testing.assert_array_equal(
        _native.levels(name).view(np.uint32), CODEBOOKS[name].levels.view(np.uint32)
    )


def test_header_dynamic_map_agrees() -> None:
    np.testing.assert_array_equal(_native.dynamic_map().view(np.uint32), dynamic_map().view(np.uint32))
