"""Exported models on releases of onnxruntime, unmodified, as they come from the package index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx_exports import BOOKS, FORMS, write_exports
from tolerance import NMSE_FLOAT16_TINY, NMSE_FLOAT32

#: The oldest supported; 1.23 to 1.28, whose optimiser mistakes float16 inputs with defaults for constants;
#: the last release before that was mended; the newest there is.
RELEASES = ["1.20.1", "1.22.1", "1.23.2", "1.24.4", "1.28.0", "newest"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    write_exports(folder)
    return folder


@pytest.mark.slow  # downloads 20 MB a release from the package index, runs 36 exports on each
@pytest.mark.parametrize("release", RELEASES)
def test_every_codebook_and_dtype_on_releases_of_onnxruntime(
    release: str, exports: Path, repo: Path, tmp_path: Path
) -> None:
    wanted = "onnxruntime" + ("" if release == "newest" else f"=={release}")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), wanted]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, str(repo / "tests" / "onnx_exports.py"), str(exports)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said, *lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit status {done.returncode} after {lines[-1:]}: {done.stderr[-2000:]}"
    assert said.removeprefix("onnxruntime ") == release or release == "newest"
    assert len(lines) == len(BOOKS) * 2 * len(FORMS)
    for book in BOOKS:
        for dtype, bound in (("f32", NMSE_FLOAT32), ("f16", NMSE_FLOAT16_TINY)):
            rows = [line.split() for line in lines if line.startswith(f"{book} {dtype}-")]
            worst = max(float(nmse) for _, _, nmse in rows)
            sys.stdout.write(f"{said}  {book} {dtype} {worst:.1e}\n")  # the table in docs/onnx.md
            assert worst <= bound, rows
