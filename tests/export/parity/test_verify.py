"""verify passes what is right and fails what is wrong, on the demo model and in real llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
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
from irq_export.parity.tokenizers import CHATS, Sample, TrainedTokenizer
from irq_export.parity.verify import verify
from irq_export.quantize_model import quantize
from irq_export.quantizer import load_model
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError, WrongBase
from irq_formats.gguf import STR, U32, GgufValue, TensorSource, open_gguf, write_gguf
from irq_formats.manifest import write_manifest
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


def rewritten(source: Path, target: Path, change: dict[str, GgufValue | None]) -> Path:
    """Copy a GGUF file with some keys set, or taken out."""
    gguf = open_gguf(source)
    values = {key: value for key, value in {**gguf.values, **change}.items() if value is not None}
    sources = [
        TensorSource(t.name, t.shape, t.type, partial(gguf.read, t.name)) for t in gguf.tensors.values()
    ]
    write_gguf(target, values, sources)
    return target


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        ({"tokenizer.ggml.eos_token_id": U32(77)}, {"keys", "end tokens", "chat template"}),
        (
            {"tokenizer.ggml.bos_token_id": U32(77)},
            {"keys", "chat template", "file against checkpoint"},
        ),
        ({"tokenizer.ggml.add_bos_token": None}, {"keys"}),
        ({"tokenizer.ggml.tokens": None}, {"keys"}),
        ({"tokenizer.ggml.eot_token_id": U32(5)}, {"keys", "end tokens"}),
        ({"tokenizer.chat_template.rag": STR("x")}, {"keys"}),
        ({"irq.model.max_position_embeddings": U32(100000)}, {"metadata"}),
        ({"irq.adapter.base_hash": None}, {"metadata"}),
        ({"irq.more": U32(1)}, {"metadata"}),
        ({"general.name": STR("Ours"), "general.license": STR("MIT")}, set()),
    ],
)
def test_a_changed_key_fails(
    irq: Case, tmp_path: Path, change: dict[str, GgufValue | None], checks: set[str]
) -> None:
    """The arrays, the logits and the tokens of texts are right; what is wrong stands beside them."""
    file = rewritten(irq.exported, tmp_path / "model.gguf", change)
    report = verify(
        file, against=irq.checkpoint, adapter=irq.adapter, runtimes=["reference"], positions=8, greedy=0
    )
    assert {check.name for check in report.checks if check.passed is False} == checks, report.to_text()


@pytest.mark.parametrize(
    ("name", "change", "checks"),
    [
        ("base.gguf", {"llama.context_length": U32(100000)}, {"metadata"}),
        ("base.gguf", {"llama.attention.sliding_window": U32(4)}, {"metadata"}),
        ("base.gguf", {"tokenizer.ggml.eos_token_id": None}, {"keys", "end tokens", "chat template"}),
        ("base.gguf", {"tokenizer.ggml.pre": STR("llama-bpe")}, {"keys"}),
        ("adapter.gguf", {"adapter.alora.invocation_tokens": U32.array([5])}, {"metadata"}),
    ],
)
def test_a_changed_key_of_a_pair_fails(
    pair: Case, tmp_path: Path, name: str, change: dict[str, GgufValue | None], checks: set[str]
) -> None:
    shutil.copytree(pair.exported, tmp_path / "pair")
    (tmp_path / "pair" / name).unlink()
    rewritten(pair.exported / name, tmp_path / "pair" / name, change)
    report = verify(
        tmp_path / "pair",
        against=pair.checkpoint,
        adapter=pair.adapter,
        runtimes=["reference"],
        positions=8,
        greedy=0,
    )
    assert {check.name for check in report.checks if check.passed is False} == checks, report.to_text()


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda text: text + "PARAMETER temperature 0\nSYSTEM Be brief.\n", True),
        (lambda text: text.replace("ADAPTER ./adapter.gguf\n", ""), False),
        (lambda text: text.replace("FROM ./base.gguf", "FROM llama3"), False),
        (lambda text: text + "template x\n", False),
    ],
)
def test_a_modelfile_that_names_another_model_fails(
    pair: Case, tmp_path: Path, change: Callable[[str], str], passed: bool
) -> None:
    shutil.copytree(pair.exported, tmp_path / "pair")
    file = tmp_path / "pair" / "Modelfile"
    file.write_text(change(file.read_text()))
    options = {"adapter": pair.adapter, "runtimes": ["reference"], "positions": 8, "greedy": 0}
    report = verify(tmp_path / "pair", against=pair.checkpoint, **options)
    wrong = {check.name for check in report.checks if check.passed is False}
    assert wrong == (set() if passed else {"Modelfile"})
    assert any(check.name == "Modelfile" for check in report.checks)


@pytest.mark.parametrize("merge", ["bf16", "f32"])
def test_merged_files_and_decoded_pairs_have_their_own_keys(irq: Case, tmp_path: Path, merge: str) -> None:
    options = {"merge": "bf16"} if merge == "bf16" else {"profile": "stock", "nf_type": "bf16"}
    to_gguf(irq.checkpoint, tmp_path / "x", adapter_dir=irq.adapter, **options)
    report = verify(
        tmp_path / "x",
        against=irq.checkpoint,
        adapter=irq.adapter,
        runtimes=["native"],
        positions=8,
        greedy=0,
    )
    assert report.passed, report.to_text()


def test_added_tokens_and_conversations_are_encoded(pair: Case, tmp_path: Path) -> None:
    """A token that takes the spaces behind it with it: only texts that hold it can show that."""
    other = tmp_path / "checkpoint"
    shutil.copytree(pair.checkpoint, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["rstrip"] = True
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_manifest(other, json.loads((other / "manifest.json").read_text())["extra"])
    report = verify(
        pair.exported,
        against=other,
        adapter=pair.adapter,
        runtimes=["llama.cpp"],
        positions=8,
        greedy=0,
    )
    wrong = {check.name: check for check in report.checks if check.passed is False}
    assert {"file against checkpoint", "llama.cpp against checkpoint"} <= wrong.keys(), report.to_text()
    token = tokenizer["added_tokens"][-1]["content"]
    assert all(token in sample.text for sample in wrong_samples(other, wrong["file against checkpoint"]))


def wrong_samples(checkpoint: Path, check: Check) -> list[Sample]:
    samples = TrainedTokenizer(checkpoint).samples()
    return [samples[i] for i in check.values["different_lines"]]


def test_every_added_token_is_encoded(irq: Case) -> None:
    trained = TrainedTokenizer(irq.checkpoint)
    seen = {token for sample in trained.samples() for token in sample.tokens}
    document = json.loads((irq.checkpoint / "tokenizer.json").read_text())
    assert document["added_tokens"]
    assert {token["id"] for token in document["added_tokens"]} <= seen
    chats = [trained.render(chat) for chat in CHATS]
    assert [sample.text for sample in trained.samples() if not sample.add_special] == chats


def test_tokens_of_transformers_that_no_file_has_are_told(tmp_path: Path) -> None:
    """For LlamaTokenizer transformers 5 rebuilds the splitter: adapters trained elsewhere learn on that."""
    write_tiny_checkpoint(tmp_path / "c", vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(tmp_path / "c", "sentencepiece")
    plain_end_token(tmp_path / "c", tokenizer_class="LlamaTokenizer")
    to_gguf(tmp_path / "c", tmp_path / "m.gguf")
    report = verify(tmp_path / "m.gguf", against=tmp_path / "c", runtimes=["native"], positions=8, greedy=0)
    assert report.passed, report.to_text()
    [check] = [check for check in report.checks if check.name == "AutoTokenizer against checkpoint"]
    assert check.passed is None
    assert "trained elsewhere" in check.detail


def test_a_template_that_refuses_all_proves_nothing(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(tmp_path / "c", chat_template="{{ raise_exception('no') }}")
    plain_end_token(tmp_path / "c")
    to_gguf(tmp_path / "c", tmp_path / "m.gguf")
    report = verify(tmp_path / "m.gguf", against=tmp_path / "c", runtimes=["native"], positions=8, greedy=0)
    assert report.passed, report.to_text()
    [check] = [check for check in report.checks if check.name == "chat template"]
    assert check.passed is None


def plain_end_token(checkpoint: Path, **more: str) -> None:
    """transformers 5 takes no special token as a table."""
    settings = checkpoint / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "</s>", **more}))


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
