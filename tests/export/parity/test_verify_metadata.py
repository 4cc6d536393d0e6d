"""What stands beside the arrays: keys, Modelfile, tokenizer, template. One that is another fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer
from verified import Case, plain_end_token, rewritten

from irq_export.export.gguf import to_gguf
from irq_export.parity.report import Check, ParityReport
from irq_export.parity.tokenizers import CHATS, Sample, TrainedTokenizer
from irq_export.parity.verify import verify
from irq_formats.blocks import BlockSpec
from irq_formats.gguf import STR, U32, GgufValue
from irq_formats.manifest import write_manifest


def verified_in_reference(file: Path, case: Case) -> ParityReport:
    return verify(
        file, against=case.checkpoint, adapter=case.adapter, runtimes=["reference"], positions=8, greedy=0
    )


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
        ({"tokenizer.ggml.pre": STR("llama-bpe")}, {"keys"}),
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
    report = verified_in_reference(file, irq)
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
    write_manifest(tmp_path / "pair")
    report = verified_in_reference(tmp_path / "pair", pair)
    assert {check.name for check in report.checks if check.passed is False} == checks, report.to_text()


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda text: text + "PARAMETER temperature 0\nSYSTEM Be brief.\n", True),
        (lambda text: text.replace("ADAPTER ./adapter.gguf\n", ""), False),
        (lambda text: text.replace("FROM ./base.gguf", "FROM llama3"), False),
        (lambda text: text + "template x\n", False),
        (lambda text: text + "FROM\t./other.gguf\n", False),
        (lambda text: text + "  ADAPTER ./none.gguf\n", False),
        (lambda text: text + '\tTEMPLATE "x"\n', False),
        (lambda text: text + "PARAMETER temperature 0\rRenderer other\r", False),
    ],
)
def test_a_modelfile_that_names_another_model_fails(
    pair: Case, tmp_path: Path, change: Callable[[str], str], passed: bool
) -> None:
    shutil.copytree(pair.exported, tmp_path / "pair")
    file = tmp_path / "pair" / "Modelfile"
    file.write_text(change(file.read_text()))
    report = verified_in_reference(tmp_path / "pair", pair)
    wrong = {check.name for check in report.checks if check.passed is False}
    assert wrong == (set() if passed else {"Modelfile"})
    assert any(check.name == "Modelfile" for check in report.checks)


def test_a_pair_without_modelfile_is_said_to_have_none(pair: Case, tmp_path: Path) -> None:
    shutil.copytree(pair.exported, tmp_path / "pair")
    (tmp_path / "pair" / "Modelfile").unlink()
    report = verified_in_reference(tmp_path / "pair", pair)
    assert report.passed
    [check] = [check for check in report.checks if check.name == "Modelfile"]
    assert check.passed is None
    (tmp_path / "pair" / "manifest.json").unlink()  # whoever passes on two files passes on no manifest
    assert verified_in_reference(tmp_path / "pair", pair).passed


@pytest.mark.parametrize("change", [{"size_bytes": 1}, {"sha256": "0" * 64}])
def test_a_manifest_of_other_files_fails(pair: Case, tmp_path: Path, change: dict[str, object]) -> None:
    shutil.copytree(pair.exported, tmp_path / "pair")
    path = tmp_path / "pair" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["adapter.gguf"] |= change
    path.write_text(json.dumps(manifest))
    report = verified_in_reference(tmp_path / "pair", pair)
    assert {check.name for check in report.checks if check.passed is False} == {"manifest.json"}


@pytest.mark.parametrize("options", [{"merge": "bf16"}, {"profile": "stock", "nf_type": "bf16"}])
def test_merged_files_and_decoded_pairs_have_their_own_keys(
    irq: Case, tmp_path: Path, options: dict[str, str]
) -> None:
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


@pytest.mark.parametrize("profile", ["irq", "stock"])
def test_a_pre_tokenizer_that_was_given_is_taken(tmp_path: Path, profile: str) -> None:
    """Nothing recognises it, so the file alone knows its name; llama.cpp's tokens decide."""
    write_tiny_checkpoint(tmp_path / "c", BlockSpec("int4"), vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(tmp_path / "c", "qwen2")
    plain_end_token(tmp_path / "c")
    path = tmp_path / "c" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x{99}"
    path.write_text(json.dumps(tokenizer))
    options = {"against": tmp_path / "c", "positions": 8, "greedy": 0}
    to_gguf(tmp_path / "c", tmp_path / "right", profile=profile, pre_tokenizer="qwen2")
    assert verify(tmp_path / "right", **options).passed
    to_gguf(tmp_path / "c", tmp_path / "wrong", profile=profile, pre_tokenizer="gpt-2")
    report = verify(tmp_path / "wrong", **options)
    wrong = {check.name for check in report.checks if check.passed is False}
    assert wrong == ({"llama.cpp against checkpoint"} if profile == "stock" else set())


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
