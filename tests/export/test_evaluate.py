"""irq-export evaluate: a checkpoint with its adapter, and what was exported from it, side by side."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from os import truncate
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from irq_export.cli import main
from irq_export.evaluate.run import Evaluation, evaluate
from irq_export.export.gguf import to_gguf
from irq_export.export.onnx import to_onnx
from irq_export.perplexity import perplexity
from irq_formats.blocks import BlockSpec
from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel, UsageError
from tests.gguf_sources import GgufSource
from tests.tiny_models import save_tiny_model
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
    odd = perplexity(model=exported, text=data / "wikitext2/wiki.test.raw", context=7, windows=9, threads=1)
    found = evaluate([exported], tasks=["wikitext2"], data=data, window=7, limit=9, threads=1).rows[0]
    assert found.values[0] == pytest.approx(odd.perplexity, rel=1e-6)


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
    longest = {**options, "tasks": ["wikitext2"], "limit": 1, "runtime": "llama.cpp"}
    assert evaluate([tmp_path / "stock"], window=511, **longest).rows[0].samples == 1
    with pytest.raises(UsageError, match="at most 511 tokens"):
        evaluate([tmp_path / "stock"], window=512, **longest)
    for runtime in ("llama.cpp", "native"):
        with pytest.raises(UsageError, match="one half of a pair"):
            evaluate([tmp_path / "stock" / "base.gguf"], runtime=runtime, **options)
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
    """Whatever can be told from the files is told before the first model is measured."""
    begun: list[str] = []
    options = {"tasks": ["arc_easy"], "data": data, "progress": lambda done, total, what: begun.append(what)}
    other = GgufSource(tmp_path / "other", BlockSpec(), vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(other.path, "sentencepiece")
    long = {**options, "tasks": ["wikitext2"], "window": 513}
    for models, changed, message in (
        ([], options, "one or two models"),
        ([exported], {**options, "limit": 0}, "limit >= 1"),
        ([exported], {**options, "seed": -1}, "seed >= 0"),
        ([exported, other.path], options, "different tokenizers"),
        ([exported, tmp_path / "none.gguf"], options, "no such file"),
        ([exported], long, "longer than what the model reads; expected at most 512 tokens, got 513"),
        ([source.path], long, "longer than what the model reads; expected at most 512 tokens, got 513"),
        ([exported], {**options, "adapter": source.adapter_dir}, "no model here takes --adapter"),
        ([source.path], {**options, "adapter_gguf": exported}, "no model here takes --adapter-gguf"),
        ([exported], {**options, "adapter_onnx": tmp_path}, "no model here takes --adapter-onnx"),
        ([exported], {**options, "adapter_gguf": tmp_path / "none"}, "no such adapter"),
        ([source.path], {**options, "mode": "fast"}, "no model here takes --mode"),
        ([exported], {**options, "mode": "fast", "runtime": "reference"}, "no model here takes --mode"),
        ([exported], {**options, "device": "cuda"}, "no model here takes --device"),
        ([exported], {**options, "dtype": "bfloat16"}, "no model here takes --dtype"),
        ([exported, source.path], {**options, "device": "bogus"}, "no such device"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(models, **changed)
    assert not begun
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text("too few words")
    with pytest.raises(UsageError, match="shorter than a window"):
        evaluate([exported], tasks=["wikitext2"], data=tmp_path, window=500)


def lose_a_matrix(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def swap_tokenizer(model: Path) -> None:
    """One whose tokens the model's embedding does not reach."""
    config = json.loads((model / "config.json").read_text())
    save_file(
        {
            name: tensor[:40].clone() if tensor.shape[0] == VOCAB_SIZE else tensor
            for name, tensor in load_file(model / "model.safetensors").items()
        },
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))


DAMAGES: dict[str, tuple[Callable[[Path], object], type[IrqError], str]] = {
    "a matrix is missing": (lose_a_matrix, MalformedFile, "1 weights are missing; got .*q_proj"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), UnsupportedModel, "cannot open the model"),
    "half a file": (lambda m: truncate(m / "model.safetensors", 5000), UnsupportedModel, "cannot open"),
    "no config": (lambda m: (m / "config.json").write_text("{"), UnsupportedModel, "does not know the model"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), UsageError, "no such file"),
    "other tokenizer": (swap_tokenizer, MalformedFile, "tokens that the model does not have"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_no_model(damage: str, data: Path, tmp_path: Path) -> None:
    """transformers would make random weights for what is missing, and tracebacks of the rest."""
    save_tiny_model(tmp_path / "m", vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(tmp_path / "m")
    harm, error, message = DAMAGES[damage]
    harm(tmp_path / "m")
    with pytest.raises(error, match=message):
        evaluate([tmp_path / "m"], tasks=["arc_easy"], data=data)
