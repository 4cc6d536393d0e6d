"""``scripts/bench_runtime.py``: its arguments, what it keeps, and a run on the demo model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import irq_export

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def files(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours.gguf in nf4 and f32.gguf, the unquantised model."""
    folder = tmp_path_factory.mktemp("runtime")
    demo = folder / "demo"
    shutil.copytree(repo / "irq_export" / "demo_model", demo)
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 1024})
    )  # what rows ask for
    irq_export.quantize(demo, folder / "nf4")
    irq_export.to_gguf(folder / "nf4", folder / "ours.gguf")
    irq_export.quantize(demo, folder / "plain", exclude=["*"])
    irq_export.to_gguf(folder / "plain", folder / "f32.gguf", merge="f32")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Q4_0, Q4_1, Q8_0 are made from --f32"),
        ("--peers Q4_K_M --f32 {f32}", "gguf-py cannot quantise to Q4_K_M"),
        ("--peers IQ4_NL --f32 {f32}", "gguf-py cannot quantise to IQ4_NL"),
        ("--peers Q4_0={f32} --text {f32}", "--text needs --f32"),
        ("--peers Q4_0=missing.gguf", "missing.gguf is not there"),
        ("--peers Q4_0={f32} --tests tg", "tg: a test is"),
    ],
)
def test_arguments_are_checked_first(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    from bench_runtime import main

    words = f"--ours nf4={files}/ours.gguf --work {tmp_path} --name x {options}"
    with pytest.raises(SystemExit) as ended:
        main(words.format(f32=files / "f32.gguf").split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column is there, from a folder without build/; bandwidth is of decoding, whatever comes last."""
    from bench_runtime import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. " * 20)
    words = f"--ours nf4={files}/ours.gguf --work work --f32 {files}/f32.gguf --peers Q8_0 --text text.txt"
    words += " --threads 1 --tests tg4 pp64 --rounds 2 --name demo"
    main(words.split())
    page = (tmp_path / "build" / "runtime-speed.md").read_text()
    assert f"    scripts/bench_runtime.py --ours nf4={files}/ours.gguf" in page
    assert "llama.cpp: `CPU" in page
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"
    ]
    assert table[0][:7] == ["row", "MiB", "KL", "tg4", "x", "pp64", "x"]
    assert [row[0].partition(",")[0] for row in table[2:]] == [
        "nf4 fast",
        "nf4 exact",
        "nf4 fast",
        "llama.cpp Q8_0",
    ]
    report = json.loads((tmp_path / "build" / "runtime-speed.json").read_text())
    part, row = report["parts"][0], report["parts"][0]["rows"][0]
    shares = [rate / read for rate, read in zip(row["rates"]["tg4"], part["bandwidth"], strict=True)]
    assert table[2][7] == f"{row['bytes_per_token'] * sum(shares) / 2:.0%}"
    assert report["quality"].keys() == {row["side"] for row in part["rows"]}


def test_files_of_another_model_are_not_taken(files: Path, tmp_path: Path) -> None:
    """Peers are made again, and quality measured again, when the file is another one."""
    from bench_runtime import Side, quality, sides_of
    from bench_runtime import argparse as arguments

    f32, cache = tmp_path / "f32.gguf", tmp_path / "quality.json"
    f32.write_bytes((files / "f32.gguf").read_bytes())
    asked = arguments.Namespace(ours=[], peers=["Q8_0"], f32=f32, work=tmp_path, llama_python=None)
    first = sides_of(asked)[0].path
    assert sides_of(asked)[0].path == first
    ours = tmp_path / "ours.gguf"
    ours.write_bytes((files / "ours.gguf").read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 50)
    side = [Side("nf4", str(ours), "ours", "exact", "avx2")]
    quality(side, f32, text, cache)
    quality(side, f32, text, cache)
    assert len(json.loads(cache.read_text())) == 1
    os.utime(f32, (1, 1))
    os.utime(ours, (1, 1))
    assert sides_of(asked)[0].path != first
    quality(side, f32, text, cache)
    assert len(json.loads(cache.read_text())) == 2


def test_sections_are_replaced_by_name() -> None:
    from bench_runtime import replace_section

    page = "# Speed\n\n## a\n\nold\n\n## b\n\nkept\n\n## Reading\n\nwords\n"
    assert replace_section(page, "a", "## a\n\nnew\n") == page.replace("old", "new")
    assert replace_section(page, "c", "## c\n") == page.replace("## Reading", "## c\n\n## Reading")
