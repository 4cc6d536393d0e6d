"""verify passes what is right and fails what is wrong, on the demo model and in real llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer

from irq_export.cli import main
from irq_export.export.gguf import to_gguf
from irq_export.iec import random_adapter
from irq_export.parity.metrics import compare, log_softmax
from irq_export.parity.report import Check, ParityReport
from irq_export.parity.verify import verify
from irq_export.quantize_model import quantize
from irq_export.quantizer import load_model
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, UsageError, WrongBase
from irq_formats.gguf import open_gguf
from irq_formats.peft_adapter import write_peft_adapter

QUICK = {"positions": 40, "greedy": 6}


class Case(NamedTuple):
    checkpoint: Path
    adapter: Path
    exported: Path


def make(repo: Path, work: Path, codebook: str, profile: str) -> Case:
    checkpoint, adapter_dir = work / "checkpoint", work / "adapter"
    quantize(repo / "irq_export" / "demo_model", checkpoint, codebook=codebook, refine="none", tie="first")
    adapter = random_adapter(load_model(checkpoint), seed=1, base_hash=open_checkpoint(checkpoint).base_hash)
    write_peft_adapter(adapter_dir, adapter, base_model_name=str(checkpoint))
    exported = work / ("model.gguf" if profile == "irq" else "pair")
    to_gguf(checkpoint, exported, profile=profile, adapter_dir=adapter_dir)
    return Case(checkpoint, adapter_dir, exported)


@pytest.fixture(scope="module")
def irq(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(repo, tmp_path_factory.mktemp("irq"), "nf4", "irq")


@pytest.fixture(scope="module")
def pair(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(repo, tmp_path_factory.mktemp("pair"), "int4", "stock")


def failed(report: ParityReport) -> set[str]:
    return {check.level for check in report.checks if check.passed is False}


def test_our_file_is_proved(irq: Case, repo: Path) -> None:
    report = verify(irq.exported, against=irq.checkpoint, adapter=irq.adapter, **QUICK)
    assert report.passed, report.to_text()
    assert {check.level for check in report.checks} == {
        "container",
        "tensors",
        "tokenizer",
        "logits",
        "greedy",
    }
    schema = json.loads((repo / "formats" / "schema" / "parity-report.schema.json").read_text())
    jsonschema.validate(json.loads(report.to_json()), schema)


def test_stock_pair_is_proved_in_llama_cpp(pair: Case) -> None:
    report = verify(pair.exported, against=pair.checkpoint, adapter=pair.adapter, **QUICK)
    assert report.passed, report.to_text()
    names = [check.name for check in report.checks if check.level == "logits"]
    assert names == [
        "reference float64 against torch float64",
        "llama.cpp on the float32 re-expansion against torch float32",
        "llama.cpp against torch float32",
        "native exact against torch float32",
        "native fast against torch float32",
    ]


def test_a_short_context_is_said_and_kept(tmp_path: Path) -> None:
    """A model of 32 positions, the defaults of 256 and 64: llama.cpp too is asked for what fits alone."""
    pytest.importorskip("xllamacpp")
    write_tiny_checkpoint(tmp_path / "c", vocab_size=VOCAB_SIZE, max_position_embeddings=32)
    save_tiny_tokenizer(tmp_path / "c")
    settings = tmp_path / "c" / "tokenizer_config.json"  # transformers 5 takes no special token as a table
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "</s>"}))
    to_gguf(tmp_path / "c", tmp_path / "pair", profile="stock")
    report = verify(tmp_path / "pair", against=tmp_path / "c", threads=1)
    first = report.checks[0]
    assert (first.name, first.passed) == ("context of the model", None)
    assert first.detail == "of 32 positions: 31 of 256 evaluated, 23 of 64 generated"
    found = {check.name: check for check in report.checks if check.level == "logits"}
    assert found["llama.cpp against torch float32"].values["positions"] == 31
    assert found["reference float64 against torch float64"].passed


def test_two_hundred_greedy_tokens(irq: Case) -> None:
    """torch, the reference and the exact engine write the same text."""
    runtimes = ["reference", "native"]
    report = verify(
        irq.exported, against=irq.checkpoint, adapter=irq.adapter, runtimes=runtimes, positions=20, greedy=200
    )
    found = {check.name: check for check in report.checks if check.level == "greedy"}
    for name in ("reference float64 against torch float64", "native exact against torch float32"):
        assert found[name].passed, found[name].detail
        assert len(found[name].values["tokens"]) == 200


@pytest.mark.parametrize("runtime", ["reference", "llama.cpp", "native"])
def test_adapter_switched_off_fails(pair: Case, runtime: str) -> None:
    """tau and LoRA are really in the adapter: at scale 0 the same files must fail."""
    report = verify(
        pair.exported,
        against=pair.checkpoint,
        adapter=pair.adapter,
        runtimes=[runtime],
        adapter_scale=0.0,
        **QUICK,
    )
    assert not report.passed
    assert "logits" in failed(report)


def test_forgotten_adapter_fails(irq: Case) -> None:
    """The file carries an adapter that the checkpoint alone does not have."""
    report = verify(irq.exported, against=irq.checkpoint, runtimes=["reference"], **QUICK)
    assert {"tensors", "logits"} <= failed(report)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.codes", "blk.0.attn_q.tau_absmax", "output_norm.weight"])
def test_one_changed_byte_fails(irq: Case, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "model.gguf"
    shutil.copyfile(irq.exported, broken)
    tensor = open_gguf(broken).tensors[name]
    with broken.open("r+b") as file:
        file.seek(tensor.offset + 2)
        byte = file.read(1)[0]
        file.seek(tensor.offset + 2)
        file.write(bytes([byte ^ 0x10]))
    report = verify(broken, against=irq.checkpoint, adapter=irq.adapter, runtimes=["reference"], **QUICK)
    assert "tensors" in failed(report)


def test_logits_that_are_not_numbers_fail(pair: Case, tmp_path: Path) -> None:
    """In every runtime, with a report in every form, and exit code 4: CI must not take it for a crash."""
    broken = tmp_path / "pair"
    shutil.copytree(pair.exported, broken)
    tensor = open_gguf(broken / "base.gguf").tensors["output_norm.weight"]
    with (broken / "base.gguf").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.array([np.nan], "<f4").tobytes())
    forms = [tmp_path / name for name in ("report.json", "junit.xml", "report.html")]
    arguments = ["verify", str(broken), "--against", str(pair.checkpoint), "--adapter", str(pair.adapter)]
    arguments += ["--positions", "8", "--greedy", "3", "--json"]
    for option, form in zip(("--report", "--junit", "--html"), forms, strict=True):
        arguments += [option, str(form)]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 4, found.output
    document = json.loads(found.stdout)
    assert document == json.loads(forms[0].read_text())
    logits = {check["name"]: check for check in document["checks"] if check["level"] == "logits"}
    assert len(logits) == 5
    for name, check in logits.items():
        assert check["passed"] is (name.startswith("llama.cpp on the float32 re-expansion"))
        assert (check["values"]["nmse"] is None) is not check["passed"]
    assert all(form.stat().st_size for form in forms)


def test_command_line(irq: Case, tmp_path: Path) -> None:
    arguments = ["verify", str(irq.exported), "--against", str(irq.checkpoint), "--runtime", "reference"]
    arguments += ["--positions", "20", "--greedy", "0"]
    report, junit = tmp_path / "new" / "report.json", tmp_path / "junit.xml"
    good = CliRunner().invoke(
        main,
        [*arguments, "--adapter", str(irq.adapter), "--json", "--report", str(report), "--junit", str(junit)],
    )
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout) == json.loads(report.read_text())
    suite = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "0"
    assert int(suite.get("tests", "0")) >= 5
    bad = CliRunner().invoke(main, arguments)
    assert bad.exit_code == 4
    assert "FAIL tensors" in bad.stdout
    html = tmp_path / "report.html"
    arguments += ["--adapter", str(irq.adapter), "--baseline", str(report), "--html", str(html)]
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0, again.output
    assert html.read_text().startswith("<!DOCTYPE html>")
    document = json.loads(report.read_text())
    for check in document["checks"]:
        if "nmse" in check["values"]:
            check["values"]["nmse"] = 0.0
            check["values"]["perplexity"] *= 0.99
    report.write_text(json.dumps(document))
    worse = CliRunner().invoke(main, arguments)
    assert worse.exit_code == 4
    assert "FAIL baseline" in worse.stdout


def test_file_of_another_model_fails(irq: Case, shared_data: Path, tmp_path: Path) -> None:
    """Exit code 4 with a report, not an error in the middle."""
    other = tmp_path / "other"
    quantize(shared_data / "models" / "stories260k-fp32" / "hf", other)
    for output, options in (("f.gguf", {}), ("pair", {"profile": "stock"}), ("m.gguf", {"merge": "bf16"})):
        to_gguf(other, tmp_path / output, **options)
        report = verify(tmp_path / output, against=irq.checkpoint, runtimes=["reference"], **QUICK)
        assert failed(report) == {"tensors"}
        assert "of another model" in report.checks[-1].detail


def test_file_of_another_checkpoint_fails(irq: Case, pair: Case) -> None:
    """The same model in other codes; and the base of a pair without its adapter."""
    for file in (pair.exported, pair.exported / "base.gguf"):
        report = verify(file, against=irq.checkpoint, runtimes=["reference"], **QUICK)
        assert "tensors" in failed(report)
    report = verify(pair.exported / "base.gguf", against=pair.checkpoint, runtimes=["reference"], **QUICK)
    assert "adapter file is missing" in report.checks[1].detail


def test_adapter_of_another_base_is_refused(irq: Case, pair: Case) -> None:
    with pytest.raises(WrongBase):
        verify(irq.exported, against=irq.checkpoint, adapter=pair.adapter, runtimes=["reference"], **QUICK)


def test_bad_calls_are_refused(irq: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        verify(tmp_path / "nothing", against=irq.checkpoint)
    with pytest.raises(UsageError, match="unknown runtime"):
        verify(irq.exported, against=irq.checkpoint, runtimes=["tensorrt"])
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(MalformedFile):
        verify(tmp_path / "junk.gguf", against=irq.checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MalformedFile, match=r"base\.gguf"):
        verify(tmp_path / "empty", against=irq.checkpoint)
    for text in (tmp_path / "nothing.txt", tmp_path / "latin.txt"):
        (tmp_path / "latin.txt").write_bytes(b"\xe9")
        with pytest.raises(UsageError, match="text cannot be read"):
            verify(irq.exported, against=irq.checkpoint, text=text)
    with pytest.raises(UsageError, match="not a number"):
        verify(irq.exported, against=irq.checkpoint, adapter_scale=float("nan"), runtimes=["reference"])


def test_metrics_of_equal_and_shifted_logits() -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.standard_normal((9, 50)), rng.integers(0, 50, 9)
    same = compare(logits, logits + 3.0, tokens)  # a constant a position means nothing
    assert same.nmse < 1e-28
    assert same.kl_mean < 1e-15
    assert same.top1 == same.top10 == 1
    other = compare(logits, rng.standard_normal((9, 50)), tokens)
    assert other.nmse > 0.5
    assert other.kl_mean > 0.1
    p = log_softmax(logits)
    assert same.perplexity == pytest.approx(np.exp(-p[np.arange(8), tokens[1:]].mean()))


def test_report_without_a_deciding_check_does_not_pass() -> None:
    report = ParityReport("f", "c", (Check("greedy", "x", None, ""),), {}, 0.0)
    assert not report.passed
