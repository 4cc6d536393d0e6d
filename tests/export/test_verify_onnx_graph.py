"""verify on ONNX folders whose tensors are right and whose model is not; and on rare ones that are right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from onnx_verified import QUICK, Made, failed, make, prove, seal

from irq_export.export.onnx import to_onnx
from irq_export.parity import onnx_verify
from irq_export.parity.verify import verify
from irq_formats.errors import UnsupportedModel
from irq_formats.manifest import MANIFEST_NAME, write_manifest
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME, open_model

FORMS: dict[str, dict[str, str]] = {
    "gqa": {},
    "standard": {"attention": "standard"},
    "f16": {"dtype": "f16"},
    "stock": {"profile": "stock"},
}


@pytest.fixture(scope="module")
def made(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(repo, tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the model fails the test."""
    monkeypatch.setattr(onnx_verify, "measure_load", None)


def nodes(proto: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == op_type]


def attention_window(proto: onnx.ModelProto) -> None:
    """Shows from position 300 on."""
    for node in nodes(proto, "GroupQueryAttention"):
        node.attribute.append(onnx.helper.make_attribute("local_window_size", 300))


def attention_scale(proto: onnx.ModelProto) -> None:
    node = nodes(proto, "GroupQueryAttention")[0]
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.01


def padding_counts(proto: onnx.ModelProto) -> None:
    """Shows in a batch of texts of different lengths."""
    shape, ones = onnx.helper.make_node("Shape", ["attention_mask"], ["shape"]), onnx.helper.make_tensor
    value = ones("one", onnx.TensorProto.INT64, [1], np.ones(1, "<i8").tobytes(), raw=True)
    node = onnx.helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=value)
    nodes(proto, "ReduceSum")[0].input[0] = "ones"
    at = next(i for i, node in enumerate(proto.graph.node) if node.op_type == "ReduceSum")
    proto.graph.node.insert(at, shape)
    proto.graph.node.insert(at + 1, node)


def padding_is_seen(proto: onnx.ModelProto) -> None:
    [node] = nodes(proto, "And")
    node.input[1] = node.input[0]


def batch_of_one(proto: onnx.ModelProto) -> None:
    for value in proto.graph.input[:2]:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def norm_epsilon(proto: onnx.ModelProto) -> None:
    """In float16 the gate of the logits lets it pass."""
    for node in nodes(proto, "Constant"):
        tensor = node.attribute[0].t
        if not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT:
            value = np.frombuffer(tensor.raw_data, "<f4")[0]
            if value < 1e-3:
                tensor.raw_data = np.array(1e-3, "<f4").tobytes()


def another_default(proto: onnx.ModelProto) -> None:
    """Without an adapter a layer's side branch is that of its default: nothing."""
    slot = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("lora_A"))
    slot.raw_data, slot.dims[1] = bytes(4 * slot.dims[0]), 1


def another_name(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="irq.more", value="1")


@pytest.mark.parametrize(
    ("form", "change", "where"),
    [
        ("gqa", attention_window, "_30).attribute[5] (local_window_size): one too many"),
        ("gqa", attention_scale, "GroupQueryAttention_30).attribute[4] (scale).f: "),
        ("gqa", padding_counts, "model.graph.node[1] ("),
        ("standard", padding_is_seen, "And_26).input[1]: '/attention/LessOrEqual"),
        ("gqa", batch_of_one, "model.graph.input[0] (input_ids).type.tensor_type.shape.dim[0]."),
        ("f16", norm_epsilon, ".t.raw_data: "),
        ("stock", another_default, "lora_A).dims[1]: '1' instead of '0'"),
        ("gqa", another_name, "model.metadata_props[4]: one too many"),
    ],
)
@pytest.mark.usefixtures("no_runtime")
def test_a_graph_that_to_onnx_does_not_build_is_not_run(
    made: Made, tmp_path: Path, form: str, change: Callable[[onnx.ModelProto], None], where: str
) -> None:
    """The tensors are right, and what a short text of one batch computes may be."""
    to_onnx(made.checkpoint, tmp_path / "o", adapters=made.adapters, **FORMS[form])
    proto = onnx.load(tmp_path / "o" / MODEL_NAME, load_external_data=False)
    change(proto)
    (tmp_path / "o" / MODEL_NAME).write_bytes(proto.SerializeToString())
    seal(tmp_path / "o")
    report = prove(made, tmp_path / "o")
    assert failed(report) == {("container", "graph")}
    [check] = [check for check in report.checks if check.name == "graph"]
    assert where in check.detail, check.detail


@pytest.mark.parametrize("name", ["rope.cos", "rope.sin"])
@pytest.mark.parametrize("form", ["gqa", "f16"])
def test_a_table_of_angles_that_is_wrong_far_back_fails(
    made: Made, tmp_path: Path, form: str, name: str
) -> None:
    to_onnx(made.checkpoint, tmp_path / "o", adapters=made.adapters, **FORMS[form])
    stored = open_model(tmp_path / "o").tensors[name]
    with (tmp_path / "o" / DATA_NAME).open("r+b") as file:
        file.seek(stored.offset + stored.nbytes // 512 * 300)
        file.write(bytes(stored.nbytes // 512))
    seal(tmp_path / "o")
    report = prove(made, tmp_path / "o", [])
    assert failed(report) == {("tensors", "files against checkpoint")}
    assert any(f"{name}: the written table" in check.detail for check in report.checks)


@pytest.mark.parametrize("name", ["chat_template.jinja", "modeling.py", "libother.dylib"])
def test_a_file_that_no_export_has_fails_though_it_is_listed(made: Made, tmp_path: Path, name: str) -> None:
    """Chat templates of a folder are used: this one is not the checkpoint's."""
    shutil.copytree(made.exported, tmp_path / "o")
    (tmp_path / "o" / name).write_text("{{ 'EVIL' }}")
    seal(tmp_path / "o")
    report = prove(made, tmp_path / "o", [])
    assert failed(report) == {("container", MANIFEST_NAME)}
    assert any(f"no export has: {name}" in check.detail for check in report.checks)


@pytest.mark.parametrize(
    "change",
    [
        {"base_hash": "0" * 64},
        {"kind": "other"},
        {"profile": "stock"},
        {"adapters": {"ghost": {"base_hash": "1" * 64}}},
        {"more": 1},
    ],
)
def test_a_manifest_that_says_something_else_fails(
    made: Made, tmp_path: Path, change: dict[str, object]
) -> None:
    shutil.copytree(made.exported, tmp_path / "o")
    manifest = json.loads((tmp_path / "o" / MANIFEST_NAME).read_text())
    (tmp_path / "o" / MANIFEST_NAME).unlink()
    write_manifest(tmp_path / "o", manifest["extra"] | change)
    report = prove(made, tmp_path / "o", [])
    assert failed(report) == {("container", MANIFEST_NAME)}
    assert any(f"says something else: {next(iter(change))}" in check.detail for check in report.checks)


@pytest.mark.parametrize("form", ["gqa", "standard"])
def test_an_export_of_a_short_context_is_proved_as_far_as_it_goes(
    made: Made, tmp_path: Path, form: str
) -> None:
    pytest.importorskip("onnxruntime_genai")
    to_onnx(made.checkpoint, tmp_path / "o", adapters=made.adapters[:1], context=40, **FORMS[form])
    report = verify(
        tmp_path / "o",
        against=made.checkpoint,
        adapter=made.adapters[:1],
        runtimes=["onnxruntime", "genai"],
        positions=64,
        greedy=64,
        threads=1,
    )
    assert report.passed, report.to_text()
    [check] = [check for check in report.checks if check.name == "context of the model"]
    assert check.detail == "of 40 positions: 39 of 64 evaluated, 31 of 64 generated"


def test_what_a_runtime_refuses_fails_a_check(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that fails is a verdict, not a traceback: here at positions that the tables do not have."""
    to_onnx(made.checkpoint, tmp_path / "o", adapters=made.adapters[:1], context=40)
    monkeypatch.setattr("irq_export.parity.onnx_target.OnnxTarget.context", 512)
    report = verify(
        tmp_path / "o",
        against=made.checkpoint,
        adapter=made.adapters[0],
        runtimes=["onnxruntime"],
        positions=64,
    )
    assert failed(report) == {("logits", "onnxruntime")}
    assert "cannot run it" in report.to_text()
    monkeypatch.setattr(onnx_verify, "measure_load", refuse)
    report = verify(
        tmp_path / "o", against=made.checkpoint, adapter=made.adapters[0], runtimes=["onnxruntime"], **QUICK
    )
    assert failed(report) == {("kernels", "onnxruntime")}


def refuse(*arguments: object, **options: object) -> None:
    raise UnsupportedModel("refused")


def test_penalties_of_the_checkpoint_do_not_move_genais_greedy_tokens(
    made: Made, repo: Path, tmp_path: Path
) -> None:
    """Qwen2's chat models ship a repetition penalty: the folder has it, the comparison has not."""
    pytest.importorskip("onnxruntime_genai")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint, checkpoint)
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps(generation | {"repetition_penalty": 1.5}))
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint, manifest["extra"])
    to_onnx(checkpoint, tmp_path / "o")
    config = json.loads((tmp_path / "o" / "genai_config.json").read_text())
    assert config["search"]["repetition_penalty"] == 1.5
    config["search"] |= {"min_length": 30, "no_repeat_ngram_size": 2, "num_return_sequences": 2}
    (tmp_path / "o" / "genai_config.json").write_text(json.dumps(config))
    report = verify(
        tmp_path / "o", against=checkpoint, runtimes=["genai"], positions=24, greedy=32, threads=1
    )
    assert report.passed, report.to_text()
