"""verify passes what is right and fails what is wrong, on the demo model and in real llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer
from verified import Case, failed, plain_end_token, rewritten

from irq_export.cli import main
from irq_export.export.gguf import to_gguf
from irq_export.parity.metrics import compare, log_softmax
from irq_export.parity.report import Check, ParityReport
from irq_export.parity.verify import verify
from irq_export.quantize_model import quantize
from irq_formats.blocks import BlockSpec
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError, WrongBase
from irq_formats.gguf import BOOL, open_gguf

QUICK = {"positions": 40, "greedy": 6}


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
    plain_end_token(tmp_path / "c")
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


def test_a_dropped_adapter_is_proved_as_dropped(irq: Case, tmp_path: Path) -> None:
    """The checkpoint has an adapter of its own, the file was exported without it."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(irq.checkpoint, checkpoint)
    shutil.copytree(irq.adapter, checkpoint / "adapter")
    to_gguf(checkpoint, tmp_path / "m.gguf", adapter="drop")
    arguments = ["verify", str(tmp_path / "m.gguf"), "--against", str(checkpoint), "--runtime", "native"]
    arguments += ["--positions", "8", "--greedy", "0"]
    assert CliRunner().invoke(main, arguments).exit_code == 4
    assert CliRunner().invoke(main, [*arguments, "--no-adapter"]).exit_code == 0
    kept = ["verify", str(irq.exported), *arguments[2:], "--no-adapter"]
    assert CliRunner().invoke(main, kept).exit_code == 4
    both = CliRunner().invoke(main, [*arguments, "--no-adapter", "--adapter-dir", str(irq.adapter)])
    assert both.exit_code == 2


def test_a_scale_needs_an_adapter(irq: Case, tmp_path: Path) -> None:
    """Else 0 would pass, which is what must fail."""
    to_gguf(irq.checkpoint, tmp_path / "plain.gguf")
    to_gguf(irq.checkpoint, tmp_path / "merged.gguf", adapter_dir=irq.adapter, adapter="merge", merge="bf16")
    for name in ("plain", "merged"):
        with pytest.raises(UsageError, match="no adapter to scale"):
            verify(tmp_path / f"{name}.gguf", against=irq.checkpoint, adapter_scale=0.0)


def test_what_no_runtime_runs_is_not_equal(irq: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"against": irq.checkpoint, "adapter": irq.adapter, "positions": 8, "greedy": 0}
    with pytest.raises(UsageError, match="cannot open a file of profile irq"):
        verify(irq.exported, runtimes=["llama.cpp"], **options)
    beside = verify(irq.exported, runtimes=["llama.cpp", "native"], **options)
    assert beside.passed
    [check] = [check for check in beside.checks if check.name == "llama.cpp"]
    assert check.passed is None

    def refuse(*_: object) -> None:
        raise UnsupportedModel("the engine does not compute with this type")

    monkeypatch.setattr("irq_export.parity.native.NativeRuntime", refuse)
    assert failed(verify(irq.exported, runtimes=["native", "llama.cpp"], **options)) == {"logits"}
    assert verify(irq.exported, runtimes=["native", "reference"], **options).passed


def test_a_base_that_says_it_is_half_is_not_equal(tmp_path: Path) -> None:
    """Its arrays are whole (there are no offsets), but no runtime opens it."""
    write_tiny_checkpoint(tmp_path / "c", BlockSpec("int4", tau="none"))
    to_gguf(tmp_path / "c", tmp_path / "pair", profile="stock")
    base = open_gguf(tmp_path / "pair" / "base.gguf")
    names = base.values["irq.stock.name"].value
    change = {"irq.stock.tau": BOOL.array([True] * len(names))}
    rewritten(tmp_path / "pair" / "base.gguf", tmp_path / "m.gguf", change)
    report = verify(tmp_path / "m.gguf", against=tmp_path / "c", runtimes=["native"], positions=8)
    assert failed(report) == {"container"}


def test_a_tokenizer_that_transformers_cannot_read_is_bad_input(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(tmp_path / "c")  # a special token as a table
    to_gguf(tmp_path / "c", tmp_path / "m.gguf")
    with pytest.raises(MalformedFile, match="transformers cannot read the tokenizer"):
        verify(tmp_path / "m.gguf", against=tmp_path / "c", runtimes=["native"], positions=8, greedy=0)


def test_a_file_without_tokenizer_is_proved_on_random_tokens(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c")
    to_gguf(tmp_path / "c", tmp_path / "m.gguf")
    options = {"against": tmp_path / "c", "runtimes": ["reference", "native"], "positions": 8, "greedy": 3}
    report = verify(tmp_path / "m.gguf", **options)
    assert report.passed, report.to_text()
    assert sum(check.level == "logits" for check in report.checks) == 3
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(UsageError, match="no tokenizer for a text"):
        verify(tmp_path / "m.gguf", text=tmp_path / "text.txt", **options)
    save_tiny_tokenizer(tmp_path / "c")
    lost = verify(tmp_path / "m.gguf", **options)
    assert failed(lost) == {"tokenizer"}


def test_a_second_adapter_is_not_passed_over(irq: Case, tmp_path: Path) -> None:
    """The file has one inside; another beside it is never simply left out."""
    to_gguf(irq.checkpoint, tmp_path / "m.gguf", adapter_dir=irq.adapter, separate_adapter=True)
    options = {"against": irq.checkpoint, "adapter": irq.adapter, "positions": 8, "greedy": 0}
    apart = verify(tmp_path / "m.gguf", adapter_gguf=tmp_path / "m.adapter.gguf", **options)
    assert apart.passed, apart.to_text()
    with pytest.raises(UsageError):
        verify(irq.exported, adapter_gguf=tmp_path / "m.adapter.gguf", **options)


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
