"""to-gguf: plans, refusals, crashes, and the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_sources import GgufSource

import irq_export
from irq_export.cli import main
from irq_export.export.gguf import convert, plan_gguf, to_gguf
from irq_export.export.gguf.plan import check_complete
from irq_export.export.gguf.tokenizer import read_tokenizer
from irq_formats.blocks import BlockSpec
from irq_formats.errors import (
    IrqError,
    MalformedFile,
    OutputExists,
    ParityFailed,
    PreflightRefused,
    UsageError,
    WrongBase,
)
from irq_formats.gguf import open_gguf
from irq_formats.manifest import check_manifest
from irq_formats.peft_adapter import write_peft_adapter

CODEBOOKS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 259, 16)]


# --- the way there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"profile": "stock"}, {"merge": "bf16"}, {"separate_adapter": True}])
def test_plan_tells_the_truth_and_writes_nothing(tmp_path, gguf_source, options):
    given = gguf_source("nf4")
    plan = plan_gguf(given.path, tmp_path / "x.gguf", adapter_dir=given.adapter_dir, **options)
    assert list(tmp_path.iterdir()) == []
    result = to_gguf(given.path, tmp_path / "x.gguf", adapter_dir=given.adapter_dir, **options)
    assert [file.path for file in result.files] == [plan.path(file) for file in plan.files]
    assert [file.nbytes for file in result.files] == [file.nbytes for file in plan.files]
    assert result.bits_per_weight == plan.bits_per_weight


@pytest.mark.parametrize("options", [{}, {"profile": "stock"}])
def test_same_input_same_bytes(tmp_path, gguf_source, options):
    given = gguf_source("nf4")
    hashes = [
        [file.sha256 for file in to_gguf(given.path, tmp_path / name, **options).files] for name in ("a", "b")
    ]
    if options:
        assert hashes[0] == hashes[1]
        assert (tmp_path / "a" / "Modelfile").read_text() == (tmp_path / "b" / "Modelfile").read_text()
    else:
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_wrong_base_is_refused(tmp_path, gguf_source):
    given = gguf_source("nf4")
    with pytest.raises(WrongBase, match="another quantised base"):
        to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=gguf_source("int4").adapter_dir)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_the_head_is_refused_by_its_name(tmp_path, gguf_source):
    given = gguf_source("nf4")
    head = next(iter(given.adapter.layers.values()))
    write_peft_adapter(tmp_path / "a", replace(given.adapter, layers={"lm_head": head}))
    with pytest.raises(MalformedFile, match=r"only linear layers of blocks can be adapted.*got output"):
        to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=tmp_path / "a")


def test_an_adapter_without_a_hash_is_noted(tmp_path, gguf_source):
    given = gguf_source("nf4")
    write_peft_adapter(tmp_path / "a", replace(given.adapter, base_hash=None))
    result = to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=tmp_path / "a")
    assert any("not checked" in note for note in result.notes)


def test_files_that_no_manifest_lists_are_noted(tmp_path, gguf_source):
    shutil.copytree(gguf_source("nf4").path, tmp_path / "c")
    assert not any("manifest" in note for note in to_gguf(tmp_path / "c", tmp_path / "a.gguf").notes)
    (tmp_path / "c" / "generation_config.json").write_text("{}")
    result = to_gguf(tmp_path / "c", tmp_path / "b.gguf")
    assert any("taken unchecked: generation_config.json" in note for note in result.notes)


def test_every_source_tensor_is_used_once(tmp_path, gguf_source):
    given = gguf_source("nf4")
    plan = plan_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir)
    names = [origin for tensor in plan.tensors for origin in tensor.origins]
    check_complete(plan, names)
    with pytest.raises(IrqError, match=r"not used exactly once.*extra: 0"):
        check_complete(plan, [*names, "extra"])
    with pytest.raises(IrqError, match="not used exactly once"):
        check_complete(plan, names[1:])
    twice = replace(plan, files=(plan.files[0], plan.files[0]))
    with pytest.raises(IrqError, match=": 2"):
        check_complete(twice, names)
    dropped = plan_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir, adapter="drop")
    assert len(dropped.skipped) == 3 * len(given.adapter.layers)
    assert "dropped, as asked" in dropped.to_text()


def test_an_existing_output_stays(tmp_path, gguf_source):
    given = gguf_source("nf4")
    (tmp_path / "m.gguf").write_bytes(b"precious")
    with pytest.raises(OutputExists):
        to_gguf(given.path, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"precious"
    to_gguf(given.path, tmp_path / "m.gguf", overwrite=True)
    open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_export_leaves_model_and_adapter_as_they_were(tmp_path, gguf_source, overwrite):
    """The adapter is complete when the model is interrupted: neither may appear, nor what was there go."""
    given = gguf_source("nf4")
    before = {}
    if overwrite:
        to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir, separate_adapter=True)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert len(before) == 2

    def interrupt(done: int, total: int, name: str) -> None:
        if name == "output_norm.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_gguf(
            given.path,
            tmp_path / "m.gguf",
            adapter_dir=given.adapter_dir,
            separate_adapter=True,
            overwrite=overwrite,
            progress=interrupt,
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_refused_first(tmp_path, gguf_source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PreflightRefused, match="not enough disk space"):
        to_gguf(gguf_source("nf4").path, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "merge"}, "quantises it again"),
        ({"profile": "other"}, "unknown profile"),
        ({"merge": "q4_0"}, "unknown merge"),
        ({"separate_adapter": True}, "no adapter to separate"),
        ({"separate_adapter": True, "profile": "stock"}, "belongs to profile irq"),
        ({"adapter": "fold"}, "there is no adapter"),
        ({"int2_type": "q3"}, "unknown int2_type"),
        ({"int2_type": "q4_0"}, "--int2-type is for the pair"),
        ({"nf_type": "q8_0"}, "--nf-type is for the pair"),
        ({"nf_type": "bf16", "merge": "f16"}, "--nf-type is for the pair"),
        ({"profile": "stock", "merge": "f16"}, "one file, profile stock a pair"),
        ({"pre_tokenizer": "nonsense"}, "no such pre-tokenizer"),
        ({"pre_tokenizer": "lama-bpe"}, "expected llama-bpe"),
    ],
)
def test_contradictions_are_refused(tmp_path, gguf_source, options, message):
    with pytest.raises(UsageError, match=message):
        to_gguf(gguf_source("nf4").path, tmp_path / "m.gguf", **options)


def test_a_wrong_file_is_rejected(tmp_path, gguf_source, monkeypatch):
    """A writer that flips one bit is found by the read-back; the file does not keep its name."""
    write = convert.write_gguf_into

    def flip(file, metadata, tensors, **options):
        first = tensors[0]

        def load():
            data = first.load().copy()
            data.view(np.uint8).reshape(-1)[5] ^= 1
            return data

        write(file, metadata, [replace(first, load=load), *tensors[1:]], **options)

    monkeypatch.setattr(convert, "write_gguf_into", flip)
    for options, output in (({}, "m.gguf"), ({"profile": "stock"}, "pair"), ({"merge": "f16"}, "f.gguf")):
        with pytest.raises(ParityFailed):
            to_gguf(gguf_source("int4").path, tmp_path / output, **options)
        assert not (tmp_path / output).exists()
        assert (tmp_path / f"{output}.rejected").exists()
        with pytest.raises(ParityFailed):  # and again: the first is not in the way
            to_gguf(gguf_source("int4").path, tmp_path / output, **options)
        assert not (tmp_path / output).exists()
        assert (tmp_path / f"{output}.rejected-2").exists()


@pytest.mark.parametrize("change", ["NaN", "one bit"])
@pytest.mark.parametrize(
    ("options", "nan"),
    [
        ({"merge": "f16"}, b"\x00\x7e"),
        ({"merge": "f32"}, b"\x00\x00\xc0\x7f"),
        ({"profile": "stock", "nf_type": "bf16"}, b"\xc0\x7f"),
        ({"profile": "stock"}, b"\x00\x7e"),  # a block of Q8_0 begins with its step
    ],
)
def test_a_wrong_weight_is_rejected(tmp_path, gguf_source, monkeypatch, options, nan, change):
    """Weights that a file holds rounded are compared too, each; codes are right in all of these."""
    write = convert.write_gguf_into

    def spoil(file, metadata, tensors, **more):
        def load(source):
            data = np.ascontiguousarray(source.load()).copy()
            if source.name == "blk.0.attn_q.weight":
                first = data.reshape(-1).view(np.uint8)[: len(nan)]
                first[:] = (
                    first ^ np.eye(1, len(nan), dtype=np.uint8)[0] if change == "one bit" else list(nan)
                )
            return data

        write(file, metadata, [replace(t, load=partial(load, t)) for t in tensors], **more)

    monkeypatch.setattr(convert, "write_gguf_into", spoil)
    with pytest.raises(ParityFailed, match=r"blk\.0\.attn_q\.weight"):
        to_gguf(gguf_source("nf4").path, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("error", "seen"),
    [(MalformedFile("a bad file"), ParityFailed), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_what_cannot_be_compared_does_not_keep_its_name(tmp_path, gguf_source, monkeypatch, error, seen):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(convert, "read_back", fail)
    with pytest.raises(seen):
        to_gguf(gguf_source("nf4").path, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.rejected"]


_CHILD = """
import sys, time
from irq_export.export.gguf import to_gguf
def stop(done, total, name):
    if done >= float(sys.argv[4]) * total:
        print("here", flush=True)
        time.sleep(60)
to_gguf(sys.argv[1], sys.argv[2], profile=sys.argv[3], progress=stop)
"""
_MOMENTS = np.random.default_rng(0).uniform(0, 1, 10).round(3)  # share of the bytes written


@pytest.mark.parametrize(
    ("profile", "moment", "signum"),
    [
        *(("irq" if i % 2 else "stock", moment, signal.SIGKILL) for i, moment in enumerate(_MOMENTS)),
        ("irq", 0.5, signal.SIGTERM),
        ("stock", 0.5, signal.SIGTERM),
    ],
)
def test_a_killed_export_leaves_nothing_under_its_name(tmp_path, gguf_source, profile, moment, signum):
    command = [sys.executable, "-c", _CHILD, gguf_source("nf4").path, tmp_path / "out", profile, str(moment)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        child.send_signal(signum)
        assert child.wait(20) != 0
    assert not (tmp_path / "out").exists()
    if signum == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []
    to_gguf(gguf_source("nf4").path, tmp_path / "out", profile=profile)  # a partial is in nobody's way


def test_an_input_is_never_overwritten(tmp_path):
    given = GgufSource(tmp_path, BlockSpec("int4"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, profile in (
        (given.path / "model.safetensors", "irq"),
        (given.path, "stock"),
        (given.adapter_dir, "stock"),
        (tmp_path, "stock"),
    ):
        with pytest.raises(UsageError, match="overwrite the input"):
            to_gguf(given.path, output, profile=profile, adapter_dir=given.adapter_dir, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("output", ["", ".", "..", "/"])
@pytest.mark.parametrize("options", [{}, {"profile": "stock"}])
def test_an_output_without_a_name_is_refused(gguf_source, monkeypatch, tmp_path, output, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"names no file|overwrite the input"):
        to_gguf(gguf_source("nf4").path, output, **options)


def test_a_given_pre_tokenizer_is_noted(repo):
    found = read_tokenizer(repo / "irq_export" / "demo_model", 1024, stock=True, pre_tokenizer="smollm")
    assert any("smollm as given" in note for note in found.notes)


def test_pair_has_a_manifest_and_a_modelfile(tmp_path, gguf_source):
    given = gguf_source("int4")
    to_gguf(given.path, tmp_path / "pair", profile="stock")
    manifest = check_manifest(tmp_path / "pair")
    assert set(manifest["files"]) == {"base.gguf", "adapter.gguf", "Modelfile"}
    assert manifest["extra"]["base_hash"] == given.base_hash
    lines = (tmp_path / "pair" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./base.gguf"
    assert "ADAPTER ./adapter.gguf" in lines


# --- command line ------------------------------------------------------------------------------------


def test_command_line(tmp_path, gguf_source, repo):
    given, output = gguf_source("nf4"), tmp_path / "m.gguf"
    call = ["to-gguf", str(given.path), "-o", str(output), "--adapter-dir", str(given.adapter_dir)]
    planned = CliRunner().invoke(main, [*call, "--dry-run", "--json"])
    assert planned.exit_code == 0, planned.output
    schema = json.loads((repo / "formats" / "schema" / "plan.schema.json").read_text())
    jsonschema.validate(json.loads(planned.stdout), schema)
    assert not output.exists()
    done = CliRunner().invoke(main, [*call, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["files"][0]["bytes"] == json.loads(planned.stdout)["files"][0]["bytes"]
    assert CliRunner().invoke(main, call).exit_code == 6
    wrong = [*call[:3], str(tmp_path / "w.gguf"), "--adapter-dir", str(gguf_source("int4").adapter_dir)]
    assert CliRunner().invoke(main, wrong).exit_code == 3
    assert CliRunner().invoke(main, [*call, "--force", "--adapter", "merge"]).exit_code == 2


def test_inspect(tmp_path, gguf_source):
    given = gguf_source("nf4")
    to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir)
    to_gguf(given.path, tmp_path / "pair", profile="stock", adapter_dir=given.adapter_dir)
    for path in (given.path, tmp_path / "m.gguf", tmp_path / "pair"):
        shown = CliRunner().invoke(main, ["inspect", str(path), "--json"])
        assert shown.exit_code == 0, shown.output
        items = json.loads(shown.stdout)["items"]
        assert items[0]["codebooks"] == {"nf4": 14}
        assert {item["base_hash"] for item in items} == {given.base_hash}
        assert given.base_hash in CliRunner().invoke(main, ["inspect", str(path)]).stdout
    assert CliRunner().invoke(main, ["inspect", str(tmp_path)]).exit_code == 2


def test_exporting_needs_no_torch(tmp_path, gguf_source):
    code = (
        "import sys, irq_export; irq_export.to_gguf(*sys.argv[1:]); import irq_export.inspect;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, gguf_source("nf4").path, tmp_path / "m.gguf"], check=False
    )
    assert done.returncode == 0
    assert irq_export.to_gguf is to_gguf
