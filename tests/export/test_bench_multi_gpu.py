"""``scripts/bench_multi_gpu.py`` on a CPU: every arm runs, and is what one process computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tolerance import DDP_GRADIENT

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_multi_gpu.py"


@pytest.mark.slow  # eleven interpreters that import torch and transformers: a minute
def test_two_gloo_processes_are_one(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work"), "--smoke", "--steps", "5"]
    subprocess.run([*command, "--json", str(tmp_path / "result.json")], check=True, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    for row in result["equality"]["against_one"].values():
        assert row["same_base"] is True
        assert row["gradients"] <= DDP_GRADIENT
        assert row["losses"] <= DDP_GRADIENT
    losses = result["equality"]["arms"]["one"][0]["losses"]
    assert losses[-1] < losses[0]  # something was learnt
    assert [len(ranks) for ranks in result["speed"]["arms"].values()] == [1, 2, 2]


@pytest.mark.parametrize("part", ["equality", "speed"])
def test_an_arm_that_fails_is_a_failure(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_multi_gpu

    def fail(folder: Path, arm: str, *args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        (folder / f"{arm}.log").write_text("out of memory")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(bench_multi_gpu, "start_arm", fail)
    with pytest.raises(SystemExit) as ended:
        bench_multi_gpu.main(
            [str(tmp_path / "work"), "--smoke", "--only", part, "--json", str(tmp_path / "json")]
        )
    assert ended.value.code == 1
    assert "fsdp failed:\nout of memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "json").read_text())[part]["arms"] == {}
