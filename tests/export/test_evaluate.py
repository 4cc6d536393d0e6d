"""irq-export evaluate: a checkpoint with its adapter, and what was exported from it, side by side."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from irq_export.cli import main
from irq_export.evaluate.run import Evaluation, evaluate
from irq_export.export.gguf import to_gguf
from irq_export.export.onnx import to_onnx
from irq_export.perplexity import perplexity
from irq_formats.blocks import BlockSpec
from irq_formats.errors import UsageError
from tests.gguf_sources import GgufSource
from tests.tiny_tokenizers import TEXT, VOCAB_SIZE, save_tiny_tokenizer
from tests.tolerance import LOGLIKELIHOOD_FLOAT32

TASKS = "arc_easy,hellaswag,mmlu,wikitext2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of questions of every kind."""
    folder = tmp_path_factory.mktemp("data")
    words = re.findall(r"\w+", "the quick brown fox jumps over lazy dogs and believes in attack ships")
    for name in ("arc_easy", "hellaswag", "mmlu", "wikitext2"):
        (folder / name).mkdir()
    rows = [
        {
            "question": f"{words[i]} {words[i + 1]}?",
            "choices": {"text": words[i : i + 4], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(8)
    ]
    (folder / "arc_easy" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [f"{words[i]} {words[i + 2]}\n{i % 4}\n" + "\n".join(words[i : i + 4]) for i in range(8)]
    (folder / "hellaswag" / "hellaswag_val_full.txt").write_text("\n".join(lines) + "\n")
    mmlu = [
        {"subject": f"s{i % 2}", "question": words[i], "choices": words[i : i + 4], "answer": i % 4}
        for i in range(8)
    ]
    for split in ("dev", "test"):
        (folder / "mmlu" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, mmlu)))
    (folder / "wikitext2" / "wiki.test.raw").write_text("".join(TEXT) * 3)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> GgufSource:
    source = GgufSource(
        tmp_path_factory.mktemp("source"), BlockSpec(), vocab_size=VOCAB_SIZE, max_position_embeddings=512
    )
    save_tiny_tokenizer(source.path)
    return source


@pytest.fixture(scope="module")
def exported(source: GgufSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "m.gguf"
    to_gguf(source.path, path, adapter_dir=source.adapter_dir)
    return path


@pytest.fixture(scope="module")
def both(source: GgufSource, exported: Path, data: Path) -> Evaluation:
    return evaluate(
        [source.path, exported],
        tasks=TASKS.split(","),
        data=data,
        adapter=source.adapter_dir,
        threads=1,
        window=64,
    )


def test_an_exact_export_changes_nothing(both: Evaluation) -> None:
    assert [run.runtime for run in both.models] == ["torch float32", "native exact"]
    assert [row.metric for row in both.rows] == [
        "acc", "acc_norm", "acc", "acc_norm", "acc", "acc_subjects", "perplexity"
    ]  # fmt: skip
    for row in both.rows:
        assert row.change is not None
        assert abs(row.change.value) <= LOGLIKELIHOOD_FLOAT32 * row.values[0]
    assert set(both.models[0].seconds) == set(TASKS.split(","))


def test_the_adapter_counts(both: Evaluation, source: GgufSource, data: Path) -> None:
    bare = evaluate([source.path], tasks=["wikitext2"], data=data, window=64).rows[0]
    assert abs(bare.values[0] - both.rows[-1].values[0]) > 100 * LOGLIKELIHOOD_FLOAT32 * bare.values[0]


def test_perplexity_is_that_of_the_verb(both: Evaluation, exported: Path, data: Path) -> None:
    expected = perplexity(model=exported, text=data / "wikitext2/wiki.test.raw", context=64, threads=1)
    assert both.rows[-1].values[1] == pytest.approx(expected.perplexity, rel=1e-6)
    assert both.rows[-1].samples == expected.windows


def test_command_line(source: GgufSource, exported: Path, data: Path, repo: Path) -> None:
    arguments = ["evaluate", str(exported), str(exported), "--tasks", "arc_easy", "--data", str(data)]
    arguments += ["--limit", "5", "--seed", "3", "--threads", "1"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    jsonschema.validate(document, json.loads((repo / "formats/schema/evaluation.schema.json").read_text()))
    assert [row["samples"] for row in document["rows"]] == [5, 5]
    assert [row["change"] for row in document["rows"]] == [{"value": 0, "stderr": 0}] * 2
    result = CliRunner().invoke(main, [*arguments, "--runtime", "reference"])
    assert "reference float32" in result.stdout
    assert "arc_easy       acc_norm          5" in result.stdout


def test_stock_exports_run_in_llama_cpp(
    source: GgufSource, exported: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    to_gguf(source.path, tmp_path / "stock", profile="stock", adapter_dir=source.adapter_dir)
    options = {"tasks": ["hellaswag"], "data": data, "threads": 1}
    stock = evaluate([tmp_path / "stock"], runtime="llama.cpp", **options)
    assert stock.models[0].runtime == "llama.cpp"
    ours = evaluate([exported], **options)
    assert [row.samples for row in stock.rows] == [8, 8]
    # nf4 on Q8_0: near, not equal; a wrong alignment of context and choice would be at chance
    assert abs(stock.rows[0].values[0] - ours.rows[0].values[0]) <= 0.25


def test_onnx_folders_run_with_our_library_and_without(
    both: Evaluation, source: GgufSource, data: Path, tmp_path: Path
) -> None:
    """The same log-likelihoods as torch, with the folder's adapter; two adapters have to be chosen from."""
    onnx = tmp_path / "onnx"
    to_onnx(source.path, onnx, adapters=[source.adapter_dir], overwrite=False)
    options = {"tasks": TASKS.split(","), "data": data, "threads": 1, "window": 64}
    for runtime in ("onnxruntime", None):
        found = evaluate([onnx], runtime=runtime, **options)
        assert found.models[0].runtime == (runtime or "onnxruntime+irq")
        for row, expected in zip(found.rows, both.rows, strict=True):
            assert abs(row.values[0] - expected.values[0]) <= LOGLIKELIHOOD_FLOAT32 * expected.values[0]
    with pytest.raises(UsageError, match="no model that this runtime runs"):
        evaluate([onnx], runtime="native", **options)
    adapter = next(onnx.glob("*.onnx_adapter"))
    shutil.copyfile(adapter, onnx / "other.onnx_adapter")
    with pytest.raises(UsageError, match="several adapters"):
        evaluate([onnx], **options)
    chosen = evaluate([onnx], adapter_onnx=adapter, limit=2, **options)
    assert chosen.rows[-1].samples == 2


def test_refusals(source: GgufSource, exported: Path, data: Path, tmp_path: Path) -> None:
    options = {"tasks": ["arc_easy"], "data": data}
    with pytest.raises(UsageError, match="one or two models"):
        evaluate([], **options)
    with pytest.raises(UsageError, match="limit >= 1"):
        evaluate([exported], limit=0, **options)
    with pytest.raises(UsageError, match="shorter than a window"):
        evaluate([exported], tasks=["wikitext2"], data=data, window=100_000, limit=1)
    other = GgufSource(tmp_path, BlockSpec(), vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(other.path, "sentencepiece")
    with pytest.raises(UsageError, match="different tokenizers"):
        evaluate([exported, other.path], **options)
