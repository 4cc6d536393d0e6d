"""irq-export bench and perplexity, on stories260K and through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from irq_export.cli import main
from irq_export.perplexity import perplexity
from irq_formats.errors import MalformedFile, OutputExists, UsageError
from irq_formats.gguf import BOOL, STR, U32, GgufValue
from irq_formats.gguf.reader import open_gguf
from irq_runtime.bench import bench
from irq_runtime.machine import default_threads
from irq_runtime.tokenizer import load_tokenizer
from tests.tiny_files import write_stock, write_stock_adapter
from tests.tiny_models import tiny_model

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play in the park. " * 20
CONTEXT = 64


@pytest.fixture(scope="module")
def model(shared_data: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        shared_data / "models" / "stories260k-fp32" / "hf", dtype=torch.float64
    )


@pytest.fixture(scope="module")
def tokenizer_keys(shared_data: Path) -> dict[str, GgufValue]:
    hf = shared_data / "models" / "stories260k-fp32" / "hf"
    return {
        "tokenizer.huggingface.json": STR((hf / "tokenizer.json").read_text()),
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
        "tokenizer.ggml.add_bos_token": BOOL(True),
    }


@pytest.fixture(scope="module")
def folder(
    model: PreTrainedModel, tokenizer_keys: dict[str, GgufValue], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    work = tmp_path_factory.mktemp("perplexity")
    write_stock(work / "m.gguf", model, metadata=tokenizer_keys)
    (work / "text.txt").write_text(TEXT)
    return work


@pytest.fixture(params=[256, 10])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that are scored together: all of a window, or a third."""
    monkeypatch.setattr("irq_export.perplexity._PIECE", request.param)
    monkeypatch.setattr("irq_export.perplexity._ROWS", 7)


@pytest.mark.usefixtures("piece")
def test_perplexity_is_that_of_transformers(folder: Path, model: PreTrainedModel) -> None:
    """Windows without overlap, BOS first, the second half scored: as llama-perplexity does."""
    ids = load_tokenizer(open_gguf(folder / "m.gguf")).encode(TEXT)
    losses = []
    for begin in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = torch.tensor([[1, *ids[begin + 1 : begin + CONTEXT]]])
        with torch.no_grad():
            log_p = model(window).logits[0].log_softmax(-1)
        rows = torch.arange(CONTEXT // 2 - 1, CONTEXT - 1)
        losses.append(-log_p[rows, window[0, CONTEXT // 2 :]])
    expected = float(torch.cat(losses).mean().exp())
    for runtime in ("native", "reference"):
        report = perplexity(
            model=folder / "m.gguf", text=folder / "text.txt", runtime=runtime, context=CONTEXT
        )
        assert report.perplexity == pytest.approx(expected, rel=1e-5)  # float32: 1e-6 a loss
        assert (report.windows, report.scored) == (len(losses), len(losses) * CONTEXT // 2)
        assert report.divergence is None


MEASURED = """
import sys
from irq_export.perplexity import perplexity
from irq_runtime.machine import peak_rss
before = peak_rss()
report = perplexity(model=sys.argv[1], text=sys.argv[2], context=1024, windows=1, threads=1)
print(report.scored, peak_rss() - before)
"""


def test_memory_is_not_that_of_a_whole_window(tokenizer_keys: dict[str, GgufValue], tmp_path: Path) -> None:
    """Of a vocabulary of 100,000 the logits of 1024 tokens are 410 MB, and 820 in float64."""
    wide = tiny_model(tied=True, vocab_size=100_000, num_hidden_layers=1, max_position_embeddings=1024)
    write_stock(tmp_path / "wide.gguf", wide, metadata=tokenizer_keys)
    (tmp_path / "long.txt").write_text(TEXT * 4)
    command = [sys.executable, "-c", MEASURED, tmp_path / "wide.gguf", tmp_path / "long.txt"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    scored, memory = map(int, said.split())
    assert scored == 512
    assert memory < 350e6  # 51 MB of weights, 102 of logits


@pytest.mark.usefixtures("piece")
def test_divergence_from_saved_logits(folder: Path, tmp_path: Path) -> None:
    options = {"text": folder / "text.txt", "context": CONTEXT, "windows": 2}
    saved = tmp_path / "logits.safetensors"
    first = perplexity(model=folder / "m.gguf", save_logits=saved, **options)
    again = perplexity(model=folder / "m.gguf", kl_against=saved, **options)
    assert again.divergence is not None
    assert (again.divergence.kl_mean, again.divergence.top1) == (0.0, 1.0)
    assert again.divergence.perplexity_reference == pytest.approx(first.perplexity, rel=1e-6)
    with pytest.raises(OutputExists):
        perplexity(model=folder / "m.gguf", save_logits=saved, **options)
    with pytest.raises(MalformedFile, match="another text"):
        perplexity(model=folder / "m.gguf", kl_against=saved, **{**options, "context": 32})
    (tmp_path / "short.txt").write_text("Once upon")
    with pytest.raises(UsageError, match="shorter"):
        perplexity(model=folder / "m.gguf", text=tmp_path / "short.txt", context=CONTEXT)
    for runtime in ("native", "reference"):
        with pytest.raises(UsageError, match="no such context"):
            perplexity(model=folder / "m.gguf", text=folder / "text.txt", context=513, runtime=runtime)
    with pytest.raises(UsageError, match="one mode"):
        perplexity(
            model=folder / "m.gguf",
            text=folder / "text.txt",
            context=CONTEXT,
            runtime="reference",
            mode="fast",
        )


def test_what_is_no_text_and_no_saved_logits(folder: Path, tmp_path: Path) -> None:
    options = {"model": folder / "m.gguf", "context": CONTEXT, "windows": 2}
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") * 500)
    with pytest.raises(UsageError, match="UTF-8"):
        perplexity(text=tmp_path / "latin1.txt", **options)
    options["text"] = folder / "text.txt"
    perplexity(save_logits=tmp_path / "good", **options)
    saved = load_file(tmp_path / "good")
    wide = {n: a if n == "tokens" else np.pad(a, ((0, 0), (0, 8))) for n, a in saved.items()}
    few = {n: a for n, a in saved.items() if n != "logits.1"}
    for name, tensors in {"wide": wide, "few": few}.items():
        save_file(tensors, tmp_path / name, metadata={"irq.kind": "logits"})
        with pytest.raises(MalformedFile, match="another vocabulary"):
            perplexity(kl_against=tmp_path / name, **options)


def test_bench(folder: Path) -> None:
    report = bench(model=folder / "m.gguf", prompt=(16,), generate=(8,), repetitions=2, threads=1)
    assert [row.name for row in report.rows] == ["pp16", "tg8"]
    prompt, generated = report.rows
    assert prompt.tokens_per_second == pytest.approx(16 / np.median(prompt.seconds))
    # every weight but the embedding is read once, and the tied head is the embedding
    weights = sum(
        tensor.nbytes for tensor in open_gguf(folder / "m.gguf").tensors.values() if len(tensor.shape) == 2
    )
    assert generated.bytes_per_token is not None
    assert weights <= generated.bytes_per_token < 1.2 * weights
    assert generated.bandwidth_share is not None
    assert report.bandwidth > 1e8
    assert "tg8" in report.to_text()


@pytest.fixture(scope="module")
def pair(folder: Path, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stock pair: the same base, and an adapter that changes it."""
    work = tmp_path_factory.mktemp("pair")
    (work / "base.gguf").write_bytes((folder / "m.gguf").read_bytes())
    rng = np.random.default_rng(0)
    out, inner = model.model.layers[0].mlp.down_proj.weight.shape
    lora = [(rng.standard_normal(shape) * 0.05).astype(np.float32) for shape in ((2, inner), (out, 2))]
    write_stock_adapter(work / "adapter.gguf", "llama", {"blk.0.ffn_down": tuple(lora)}, 0.0)
    return work


def test_a_pair_is_named_by_its_directory(folder: Path, pair: Path) -> None:
    options = {"text": folder / "text.txt", "context": CONTEXT, "windows": 1}
    whole = perplexity(model=pair, **options).perplexity
    assert whole == perplexity(model=pair / "base.gguf", adapter=pair / "adapter.gguf", **options).perplexity
    assert whole != perplexity(model=pair / "base.gguf", **options).perplexity
    with pytest.raises(UsageError, match="adapter of its own"):
        perplexity(model=pair, adapter=pair / "adapter.gguf", **options)
    sizes = {"prompt": (4,), "generate": (2,), "repetitions": 1, "threads": 1}
    cost, base_cost = (bench(model=m, **sizes).rows[1].bytes_per_token for m in (pair, pair / "base.gguf"))
    assert cost > base_cost  # the adapter is read too
    result = CliRunner().invoke(main, ["bench", str(pair), "-p", "4", "-n", "2", "-r", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(main, ["bench", str(folder)]).exit_code == 3  # a directory, but no pair


def test_command_lines(folder: Path) -> None:
    file, text = str(folder / "m.gguf"), str(folder / "text.txt")
    result = CliRunner().invoke(main, ["bench", file, "-p", "8", "-n", "4", "-r", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert {row["name"] for row in json.loads(result.stdout)["rows"]} == {"pp8", "tg4"}
    result = CliRunner().invoke(main, ["perplexity", file, text, "-c", "64", "--windows", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scored"] == 32
    assert CliRunner().invoke(main, ["bench", text]).exit_code == 3
    assert CliRunner().invoke(main, ["bench", file, "-p", "513"]).exit_code == 2  # the model has 512


def test_bench_measures_what_run_runs(folder: Path) -> None:
    """Its defaults are those of run; its own buffer of 256 MiB is no memory of the model's."""
    program = [sys.executable, "-m", "irq_export"]
    command = [*program, "bench", folder / "m.gguf", "-p", "8", "-n", "4", "-r", "1", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert report["peak_rss_bytes"] < 256 << 20
    defaults = {
        name: {p.name: p.default for p in main.get_command(None, name).params} for name in ("run", "bench")
    }
    assert all(defaults["bench"][name] == defaults["run"][name] for name in ("mode", "threads", "half_cache"))
    assert report["threads"] == default_threads()
    assert report["mode"] == defaults["run"]["mode"] == "exact"


def test_neither_needs_torch() -> None:
    code = "import sys, irq_export.perplexity, irq_runtime.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
