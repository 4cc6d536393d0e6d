"""``scripts/bench_kernels.py``: what is measured from the cache fits it, in every format."""

from __future__ import annotations

import pytest


def test_cache_rows_are_of_one_size(capsys: pytest.CaptureFixture[str]) -> None:
    from bench_kernels import BLOCKS, CACHE_BYTES, ROW_BYTES, main, shape_of, weight_of

    for name in (*BLOCKS, *ROW_BYTES):
        nbytes = weight_of(name, shape_of("cache", name)).nbytes
        assert 0.97 * CACHE_BYTES < nbytes <= CACHE_BYTES, name
    options = "--formats f32 nf4 --isas scalar --modes exact --sizes cache --threads 1 --rounds 1"
    main(options.split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(line[1], float(line[6])) for line in lines] == [("f32", 32.0), ("nf4", 4.25)]
