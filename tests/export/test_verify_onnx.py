"""verify on ONNX exports of the demo model: right passes, wrong fails, and nothing strange is run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jsonschema
import onnx
import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")

from onnx_verified import QUICK, Made, failed, make, prove, seal

from irq_export.cli import main
from irq_export.export.onnx import to_onnx
from irq_export.parity import onnx_verify
from irq_export.parity.gates import LOAD_MEMORY_RATIO
from irq_export.parity.onnx_runtimes import count_kernels
from irq_export.parity.onnx_target import open_onnx_target
from irq_export.parity.verify import verify
from irq_export.quantize_model import quantize
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, UsageError, WrongBase
from irq_formats.manifest import MANIFEST_NAME
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME, open_model
from irq_runtime.onnx import library_path

GENAI = ["genai", "genai+irq"]


@pytest.fixture(scope="module")
def made(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(repo, tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged; :func:`seal` makes its manifest fit again."""
    shutil.copytree(made.exported, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_export_is_proved_in_every_runtime(made: Made, repo: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    report = prove(made, runtimes=list(onnx_verify.ONNX_RUNTIMES))
    assert report.passed, report.to_text()
    logits = [check for check in report.checks if check.level == "logits" and "against" in check.name]
    # base and two adapters in four runtimes; the two sessions run the base once more after the adapters
    assert len(logits) == 4 * 3 + 2
    greedy = [check for check in report.checks if check.level == "greedy"]
    assert len(greedy) == 4 * 3
    assert all(len(check.values["tokens"]) == QUICK["greedy"] for check in greedy)
    schema = json.loads((repo / "formats" / "schema" / "parity-report.schema.json").read_text())
    jsonschema.validate(json.loads(report.to_json()), schema)


def test_who_ran_is_told_apart(made: Made) -> None:
    model = open_model(made.exported)
    assert count_kernels(model, library=False) == 0
    assert count_kernels(model, library=True) == 7 * 4  # every linear layer of four


def test_a_library_that_does_not_take_over_is_noticed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from irq_export.parity import onnx_runtimes

    monkeypatch.setattr(onnx_runtimes, "register", lambda options: None)
    assert failed(prove(made)) == {("kernels", "onnxruntime+irq")}


@pytest.mark.parametrize("tensor", ["codes", "scale", "tau"])
def test_one_changed_byte_fails(made: Made, copy: Path, tensor: str) -> None:
    stored = open_model(copy).tensors[f"model.layers.3.mlp.down_proj.{tensor}"]
    with (copy / DATA_NAME).open("r+b") as file:
        file.seek(stored.offset + 3)
        byte = file.read(1)
        file.seek(stored.offset + 3)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(MalformedFile):
        prove(made, copy)  # the manifest says so already
    seal(copy)
    assert failed(prove(made, copy, [])) == {("tensors", "files against checkpoint")}


def test_swapped_adapters_fail(made: Made, copy: Path) -> None:
    first, second = (copy / f"{name}.onnx_adapter" for name in ("first", "second"))
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    seal(copy)
    levels = failed(prove(made, copy))
    assert ("tensors", "files against checkpoint") in levels
    assert sum(level == "logits" for level, _ in levels) == 2  # both adapters; the base is right


@pytest.mark.parametrize(
    "change",
    [
        {"filename": "../model.onnx"},
        {"session_options": {"custom_ops_library": "libirq_onnx.so"}},
        {"session_options": {"log_id": "x", "provider_options": [{"evil": {}}]}},
    ],
)
def test_genai_is_not_run_on_a_configuration_of_others(
    made: Made, copy: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        pytest.fail("was run")

    monkeypatch.setattr(onnx_verify, "run_genai", never)
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"] |= change
    (copy / "genai_config.json").write_text(json.dumps(config))
    seal(copy)
    assert failed(prove(made, copy, GENAI)) == {("container", "genai_config.json")}


@pytest.mark.parametrize("name", ["genai_config.json", library_path().name, "notes.so.1", "other.onnx"])
@pytest.mark.timeout(60)  # a pipe must not be waited for
def test_a_file_that_the_manifest_does_not_list_fails(made: Made, copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    seal(copy)
    os.mkfifo(copy / name)
    fails = {MANIFEST_NAME, name} if name == "genai_config.json" else {MANIFEST_NAME}
    assert failed(prove(made, copy, [])) == {("container", what) for what in fails}


def test_what_people_and_hubs_add_is_no_failure(made: Made, copy: Path) -> None:
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    for name in ("README.md", "LICENSE.txt", ".gitattributes", ".cache/huggingface/model.onnx.metadata"):
        (copy / name).write_text("made elsewhere\n")
    assert failed(prove(made, copy, [])) == set()


def test_a_configuration_of_megabytes_is_not_read(made: Made, copy: Path) -> None:
    with (copy / "genai_config.json").open("ab") as file:
        file.write(b" " * (1 << 20))
    seal(copy)
    assert failed(prove(made, copy, [])) == {("container", "genai_config.json")}


def test_the_folder_is_known_as_one_of_hugging_face(made: Made, copy: Path) -> None:
    config = copy / "config.json"
    assert config.read_bytes() == (made.checkpoint / "config.json").read_bytes()
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": "evil.Code"}})
    )
    seal(copy)
    assert failed(prove(made, copy, [])) == {("tokenizer", "files")}


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({"temperature": 0.6, "do_sample": True, "max_length": 64}, True),
        ({"max_length": 513}, False),
        ({"max_length": None}, False),
        ({"past_present_share_buffer": False}, False),
    ],
)
def test_settings_of_genais_search_are_free(
    made: Made, copy: Path, change: dict[str, object], passed: bool
) -> None:
    """They may be edited as the folder lies there, but not to what the graph has no room for."""
    config = json.loads((copy / "genai_config.json").read_text())
    config["search"] |= change
    (copy / "genai_config.json").write_text(json.dumps(config))
    assert failed(prove(made, copy, [])) == (set() if passed else {("container", "genai_config.json")})


def test_another_library_is_not_loaded(made: Made, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = library_path().name
    (copy / name).write_bytes(library_path().read_bytes() + b"\0")
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = name
    (copy / "genai_config.json").write_text(json.dumps(config))
    seal(copy)
    monkeypatch.setattr(onnx_verify, "OnnxRuntime", None)
    monkeypatch.setattr(onnx_verify, "run_genai", None)
    assert failed(prove(made, copy, GENAI)) == {("container", name)}


def test_nothing_runs_before_the_reader_has_accepted_the_model(
    made: Made, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    proto = onnx.load(copy / MODEL_NAME, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../copy/model.onnx.data"
    (copy / MODEL_NAME).write_bytes(proto.SerializeToString())
    seal(copy)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(MalformedFile, match="outside the model's folder"):
        prove(made, copy)


def test_a_folder_with_the_library_runs_it(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    to_onnx(made.checkpoint, tmp_path / "o", library=True, adapters=made.adapters[:1])
    assert (tmp_path / "o" / library_path().name).read_bytes() == library_path().read_bytes()
    report = verify(
        tmp_path / "o", against=made.checkpoint, adapter=made.adapters[0], runtimes=["genai"], **QUICK
    )
    assert report.passed, report.to_text()
    with pytest.raises(UsageError, match="profile stock"):
        to_onnx(made.checkpoint, tmp_path / "p", library=True, profile="stock")


def test_a_baked_adapter_is_part_of_the_model(made: Made, tmp_path: Path) -> None:
    to_onnx(made.checkpoint, tmp_path / "o", adapters=made.adapters[:1], bake_adapter=True)
    options = {"against": made.checkpoint, "runtimes": ["onnxruntime"], **QUICK}
    assert verify(tmp_path / "o", adapter=made.adapters[0], **options).passed
    shutil.copytree(made.adapters[0], tmp_path / "moved")
    assert verify(tmp_path / "o", adapter=tmp_path / "moved", **options).passed
    other = verify(tmp_path / "o", adapter=made.adapters[1], **options)
    assert failed(other) == {("container", "graph")}  # it has another rank
    with pytest.raises(UsageError, match="adapters"):
        verify(tmp_path / "o", **options)


@pytest.mark.parametrize("options", [{"profile": "stock"}, {"attention": "standard"}, {"dtype": "f16"}])
def test_other_forms(made: Made, tmp_path: Path, options: dict[str, str]) -> None:
    pytest.importorskip("onnxruntime_genai")
    to_onnx(made.checkpoint, tmp_path / "o", adapters=made.adapters[:1], **options)
    runtimes = ["genai"] if "attention" in options else ["onnxruntime", "onnxruntime+irq", "genai"]
    report = verify(
        tmp_path / "o", against=made.checkpoint, adapter=made.adapters[0], runtimes=runtimes, **QUICK
    )
    assert report.passed, report.to_text()
    skipped = [check.name for check in report.checks if check.passed is None and "not run" in check.detail]
    assert skipped == (["onnxruntime+irq"] if "profile" in options else [])


def test_a_library_that_could_do_nothing_is_refused(made: Made, tmp_path: Path) -> None:
    to_onnx(made.checkpoint, tmp_path / "o", profile="stock")
    with pytest.raises(UsageError, match="no nodes for our library"):
        verify(tmp_path / "o", against=made.checkpoint, runtimes=["onnxruntime+irq"], **QUICK)


def test_an_export_that_lacks_the_checkpoints_adapter(made: Made, tmp_path: Path) -> None:
    """It is another model; that it is the base on purpose has to be said."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint, checkpoint)
    to_onnx(checkpoint, tmp_path / "o")
    shutil.copytree(made.adapters[0], checkpoint / "adapter")
    options = {"against": checkpoint, "runtimes": ["onnxruntime"], **QUICK}
    with pytest.raises(UsageError, match="--no-adapter"):
        verify(tmp_path / "o", **options)
    assert verify(tmp_path / "o", no_adapter=True, **options).passed


def test_adapters_given_and_found_must_be_the_same(made: Made) -> None:
    for adapters in ([], made.adapters[:1]):
        with pytest.raises(UsageError, match="adapters given are not those"):
            verify(made.exported, against=made.checkpoint, adapter=adapters, **QUICK)
    with pytest.raises(UsageError, match="unknown runtime"):
        prove(made, runtimes=["llama.cpp"])
    with pytest.raises(UsageError, match="scale 1"):
        verify(made.exported, against=made.checkpoint, adapter=made.adapters, adapter_scale=0.5)


def test_another_checkpoint_fails(made: Made, repo: Path, tmp_path: Path) -> None:
    quantize(repo / "irq_export" / "demo_model", tmp_path / "c", codebook="nf4", icq=False)
    with pytest.raises(WrongBase):
        verify(made.exported, against=tmp_path / "c", adapter=made.adapters, **QUICK)
    to_onnx(made.checkpoint, tmp_path / "o")
    report = verify(tmp_path / "o", against=tmp_path / "c", runtimes=["onnxruntime"], **QUICK)
    assert failed(report) == {("container", MANIFEST_NAME), ("container", "graph")}
    assert any("another checkpoint" in check.detail for check in report.checks)


@pytest.mark.parametrize(("ratio", "passed"), [(LOAD_MEMORY_RATIO, True), (LOAD_MEMORY_RATIO + 0.01, False)])
def test_memory_of_loading_is_a_gate(
    made: Made, ratio: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_onnx_target(made.exported, open_checkpoint(made.checkpoint), made.adapters)
    size = target.nbytes
    monkeypatch.setattr(onnx_verify, "measure_load", lambda model, library: int(ratio * size))
    assert onnx_verify._memory_check(target, "onnxruntime").passed is None  # too small a model to decide
    monkeypatch.setattr(onnx_verify, "SESSION_BYTES", size)
    assert onnx_verify._memory_check(target, "onnxruntime").passed is passed


def test_command_line(made: Made) -> None:
    call = ["verify", str(made.exported), "--against", str(made.checkpoint), "--runtime", "onnxruntime,genai"]
    adapters = [option for adapter in made.adapters for option in ("--adapter", str(adapter))]
    quick = ["--positions", "8", "--greedy", "0", "--json"]
    run = CliRunner().invoke(main, [*call, *adapters, *quick])
    pytest.importorskip("onnxruntime_genai")
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert {"onnxruntime", "onnxruntime-genai"} <= report["environment"].keys()
    assert CliRunner().invoke(main, [*call, *quick]).exit_code == UsageError.exit_code
