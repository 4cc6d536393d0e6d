"""to-gguf: what lies in the files is what was trained, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import quants
from tiny_checkpoints import write_tiny_checkpoint
from tolerance import NF_IN_Q8_0_NMSE, NMSE_FLOAT32, NMSE_FLOAT64

import irq_export
from irq_export.cli import main
from irq_export.export.gguf import convert, plan_gguf, to_gguf
from irq_export.export.gguf.merged import round_once
from irq_export.export.gguf.plan import check_complete
from irq_formats.adapter import Adapter, delta_weight, random_layer
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import (
    IrqError,
    OutputExists,
    ParityFailed,
    PreflightRefused,
    UnsupportedModel,
    UsageError,
    WrongBase,
)
from irq_formats.gguf import GgmlType, open_gguf
from irq_formats.manifest import check_manifest
from irq_formats.names import hf_to_gguf
from irq_formats.peft_adapter import write_peft_adapter
from irq_runtime.reference import load_model

CODEBOOKS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 259, 16)]


class Source:
    """A tiny checkpoint with an adapter that has elastic connections."""

    def __init__(self, path: Path, spec: BlockSpec, **options: object) -> None:
        self.path = path / "checkpoint"
        self.adapter_dir = path / "adapter"
        self.tensors = write_tiny_checkpoint(self.path, spec, **options)  # type: ignore[arg-type]
        checkpoint = open_checkpoint(self.path)
        self.model, self.base_hash = checkpoint.model, checkpoint.base_hash
        self.plain = {name: checkpoint.plain_f32(name) for name in checkpoint.plain}
        rng = np.random.default_rng(7)
        modules = [name for name in self.tensors if name.startswith("model.layers")]
        layers = {module: random_layer(self.tensors[module].shape, 8.0, rng) for module in modules}
        self.adapter = Adapter(layers, self.base_hash)
        write_peft_adapter(self.adapter_dir, self.adapter)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """One source for each codebook, made when first asked for."""
    made: dict[str, Source] = {}

    def get(codebook: str = "nf4") -> Source:
        if codebook not in made:
            made[codebook] = Source(tmp_path_factory.mktemp(codebook), BlockSpec(codebook))
        return made[codebook]

    return get


# --- independent decoding: gguf-py's reader and dequantisers, and a few lines for what it lacks ---------


def _theirs(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _unpermuted(rows: np.ndarray, name: str, head_dim: int = 32) -> np.ndarray:
    """Row 2 i + half of a head of a llama file is row half * d/2 + i of Hugging Face's."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return rows
    index = np.arange(len(rows))
    head, within = index // head_dim, index % head_dim
    back = np.empty_like(index)
    back[head * head_dim + within % 2 * (head_dim // 2) + within // 2] = index
    return rows[back]


def _q2_0(path: Path, name: str) -> np.ndarray:
    """gguf-py 0.19 knows no Q2_0: bytes through our reader, decoded here: d * (q - 1)."""
    raw = open_gguf(path).read(name)
    blocks = raw.reshape(-1, 18)
    step = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(-1, 64, 2)
    return (step * (bits[..., 0] + 2.0 * bits[..., 1] - 1).astype(np.float32)).reshape(len(raw), -1)


def _base_weights(path: Path, name: str) -> np.ndarray:
    if open_gguf(path).tensors[name].type is GgmlType.Q2_0:
        return _unpermuted(_q2_0(path, name), name)
    tensor = _theirs(path)[name]
    return _unpermuted(quants.dequantize(tensor.data, tensor.tensor_type), name)


def _nmse(got: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(got.astype(np.float64) - expected.astype(np.float64)).sum()
    return float(error / np.square(expected.astype(np.float64)).sum())


# --- profile irq -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_irq_moves_every_part_bit_for_bit(tmp_path, source, codebook):
    given = source(codebook)
    result = to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir)
    theirs = _theirs(tmp_path / "m.gguf")
    for module, tensor in given.tensors.items():
        for part, array in tensor.parts.items():
            assert theirs[f"{hf_to_gguf(module)}.{part}"].data.tobytes() == array.tobytes()
    for name, array in given.plain.items():
        np.testing.assert_array_equal(theirs[hf_to_gguf(name)].data, array)
    for module, layer in given.adapter.layers.items():
        assert theirs[f"{hf_to_gguf(module)}.lora_a"].data.tobytes() == layer.lora_a.tobytes()
        assert theirs[f"{hf_to_gguf(module)}.lora_b"].data.tobytes() == layer.lora_b.tobytes()
    assert result.read_back.rounded == 0
    assert result.read_back.exact >= len(theirs) - len(given.adapter.layers)
    total = sum(tensor.nbytes for tensor in given.tensors.values())
    weights = sum(np.prod(tensor.shape) for tensor in given.tensors.values())
    assert result.bits_per_weight == 8 * total / weights


def test_irq_adapter_forms_compute_the_same(tmp_path, source):
    given = source("nf4")
    options = {"adapter_dir": given.adapter_dir}
    to_gguf(given.path, tmp_path / "kept.gguf", **options)
    to_gguf(given.path, tmp_path / "folded.gguf", adapter="fold", **options)
    split = to_gguf(given.path, tmp_path / "split.gguf", separate_adapter=True, **options)
    to_gguf(given.path, tmp_path / "dropped.gguf", adapter="drop", **options)
    assert [file.path.name for file in split.files] == ["split.adapter.gguf", "split.gguf"]
    kept = load_model(tmp_path / "kept.gguf").logits(TOKENS)
    folded = load_model(tmp_path / "folded.gguf").logits(TOKENS)
    separate = load_model(tmp_path / "split.gguf", tmp_path / "split.adapter.gguf").logits(TOKENS)
    bare = load_model(tmp_path / "split.gguf").logits(TOKENS)
    dropped = load_model(tmp_path / "dropped.gguf").logits(TOKENS)
    assert _nmse(folded, kept) < NMSE_FLOAT64
    np.testing.assert_array_equal(separate, kept)
    np.testing.assert_array_equal(dropped, bare)
    assert _nmse(bare, kept) > 1e-3  # the adapter matters


# --- profile stock -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_stock_pair_holds_the_weights(tmp_path, source, codebook):
    """Base plus the tau columns of the adapter, decoded by others, is the trained matrix, bit for bit."""
    given = source(codebook)
    result = to_gguf(given.path, tmp_path / "pair", profile="stock", adapter_dir=given.adapter_dir)
    lora = _theirs(tmp_path / "pair" / "adapter.gguf")
    for module, tensor in given.tensors.items():
        name = f"{hf_to_gguf(module)}.weight"
        weight = _base_weights(tmp_path / "pair" / "base.gguf", name)
        a, b = lora[f"{name}.lora_a"].data, _unpermuted(lora[f"{name}.lora_b"].data, name)
        layer = given.adapter.layers[module]
        tau = b[:, layer.rank :]
        assert tau.tobytes() == tensor.tau().tobytes()
        np.testing.assert_array_equal(a[layer.rank :], np.repeat(np.eye(tau.shape[1]), 64, axis=1))
        whole = weight + np.repeat(tau, 64, axis=1)
        if codebook.startswith("int"):
            np.testing.assert_array_equal(whole, tensor.dequantize())
        else:
            error = np.square((whole - tensor.dequantize()).astype(np.float64)).sum()
            spread = tensor.dequantize() - np.repeat(tensor.tau(), 64, axis=1)
            assert error / np.square(spread.astype(np.float64)).sum() < 1.2 * NF_IN_Q8_0_NMSE[codebook]
        delta = b[:, : layer.rank].astype(np.float64) @ a[: layer.rank]
        assert _nmse(delta, delta_weight(layer)) < NMSE_FLOAT32
    keys = open_gguf(tmp_path / "pair" / "adapter.gguf").metadata
    assert (keys["adapter.type"], keys["adapter.lora.alpha"]) == ("lora", 0.0)
    assert (result.read_back.rounded == 0) == codebook.startswith("int")


@pytest.mark.parametrize(
    ("codebook", "kind"), [("int4", "Q4_0"), ("int3", "Q4_0"), ("int2", "Q2_0"), ("nf4", "Q8_0")]
)
def test_stock_types(tmp_path, source, codebook, kind):
    given = source(codebook)
    to_gguf(given.path, tmp_path / "pair", profile="stock")
    tensors = open_gguf(tmp_path / "pair" / "base.gguf").tensors
    assert {tensors[f"{hf_to_gguf(module)}.weight"].type.name for module in given.tensors} == {kind}
    vectors = [tensor for tensor in tensors.values() if len(tensor.shape) == 1]
    assert vectors
    assert all(tensor.type is GgmlType.F32 for tensor in vectors)


def test_int2_in_q4_0_and_nf4_in_bf16(tmp_path, source):
    given = source("int2")
    to_gguf(given.path, tmp_path / "q4", profile="stock", int2_type="q4_0")
    base = tmp_path / "q4" / "base.gguf"
    assert _theirs(base)["blk.0.attn_q.weight"].tensor_type.name == "Q4_0"
    tensor = given.tensors["model.layers.0.self_attn.q_proj"]
    scaled = tensor.spec.codec.decode(tensor.codes(), tensor.scale(), np.zeros_like(tensor.tau()))
    np.testing.assert_array_equal(_base_weights(base, "blk.0.attn_q.weight"), scaled)

    given = source("nf4")
    to_gguf(given.path, tmp_path / "bf16", profile="stock", nf_type="bf16", adapter_dir=given.adapter_dir)
    for module, tensor in given.tensors.items():
        name = f"{hf_to_gguf(module)}.weight"
        expected = quants.quantize(tensor.dequantize(), gguf.GGMLQuantizationType.BF16)
        stored = _theirs(tmp_path / "bf16" / "base.gguf")[name].data
        assert _unpermuted(stored, name).tobytes() == expected.tobytes()
    ranks = {
        tensor.data.shape[0]
        for name, tensor in _theirs(tmp_path / "bf16" / "adapter.gguf").items()
        if name.endswith("a")
    }
    assert ranks == {8}  # no tau columns: tau is inside the weights
    to_gguf(given.path, tmp_path / "alone", profile="stock", nf_type="bf16")
    assert not (tmp_path / "alone" / "adapter.gguf").exists()
    assert "ADAPTER" not in (tmp_path / "alone" / "Modelfile").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_int8_embeddings(tmp_path, tied):
    given = Source(tmp_path, BlockSpec("int4"), embedding=True, tied=tied)
    for profile, output in (("irq", "m.gguf"), ("stock", "pair")):
        to_gguf(given.path, tmp_path / output, profile=profile, adapter_dir=given.adapter_dir)
    names = open_gguf(tmp_path / "m.gguf").tensors
    assert ("output.codes" in names) == (not tied)
    base = tmp_path / "pair" / "base.gguf"
    assert ("output.weight" in open_gguf(base).tensors) == (not tied)
    for module in ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]:
        weights = _base_weights(base, f"{hf_to_gguf(module)}.weight")
        np.testing.assert_array_equal(weights, given.tensors[module].dequantize())
    pair = load_model(base, tmp_path / "pair" / "adapter.gguf").logits(TOKENS)
    assert _nmse(pair, load_model(tmp_path / "m.gguf").logits(TOKENS)) < NMSE_FLOAT64


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families_compute_the_same_in_both_profiles(tmp_path, family):
    given = Source(tmp_path, BlockSpec("int4"), model_type=family)
    to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir)
    to_gguf(given.path, tmp_path / "pair", profile="stock", adapter_dir=given.adapter_dir)
    to_gguf(given.path, tmp_path / "f32.gguf", merge="f32", adapter_dir=given.adapter_dir)
    expected = load_model(tmp_path / "m.gguf").logits(TOKENS)
    pair = load_model(tmp_path / "pair" / "base.gguf", tmp_path / "pair" / "adapter.gguf").logits(TOKENS)
    assert _nmse(pair, expected) < NMSE_FLOAT64
    assert _nmse(load_model(tmp_path / "f32.gguf").logits(TOKENS), expected) < NMSE_FLOAT64


def test_llama3_rotation_travels_as_a_tensor(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    given = Source(tmp_path, BlockSpec("int4"), rope_scaling=scaling)
    to_gguf(given.path, tmp_path / "m.gguf")
    to_gguf(given.path, tmp_path / "pair", profile="stock")
    expected = load_model(tmp_path / "m.gguf").logits(TOKENS)
    pair = load_model(tmp_path / "pair" / "base.gguf", tmp_path / "pair" / "adapter.gguf").logits(TOKENS)
    assert _nmse(pair, expected) < NMSE_FLOAT64


def test_scales_beyond_fp16_are_refused(tmp_path):
    given = Source(tmp_path, BlockSpec("int4", scale_rounding="none"))
    with pytest.raises(UnsupportedModel, match="--merge bf16"):
        to_gguf(given.path, tmp_path / "pair", profile="stock")
    assert not (tmp_path / "pair").exists()
    to_gguf(given.path, tmp_path / "m.gguf")


# --- merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_merge_rounds_once(tmp_path, source, kind):
    given = source("nf4")
    to_gguf(given.path, tmp_path / "m.gguf", merge=kind, adapter_dir=given.adapter_dir)
    fraction_bits, smallest = {"f32": (23, 2.0**-149), "f16": (10, 2.0**-24), "bf16": (7, 2.0**-133)}[kind]
    for module, tensor in given.tensors.items():
        name = f"{hf_to_gguf(module)}.weight"
        exact = tensor.dequantize().astype(np.float64) + delta_weight(given.adapter.layers[module])
        stored = _base_weights(tmp_path / "m.gguf", name).astype(np.float64)
        ulp = np.maximum(2.0 ** (np.floor(np.log2(np.abs(exact))) - fraction_bits), smallest)
        # float64 sums of another order shift the middle between two neighbours by 1e-16 of the summands
        assert (np.abs(stored - exact) <= 0.5 * ulp + 1e-15).all()


def test_bf16_is_not_rounded_twice():
    """1 + 2^-8 + 2^-30 lies above the middle of two bf16; float32 would hide that and round to even."""
    value = np.array([[1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-8 - 2.0**-30, -(1 + 3 * 2.0**-8 - 2.0**-30)]])
    assert (round_once(value, GgmlType.BF16, "x") == [[0x3F81, 0x3F80, 0xBF81]]).all()
    with pytest.raises(UnsupportedModel, match="exceeds F16"):
        round_once(np.array([[7e4]]), GgmlType.F16, "x")


def test_merge_f32_is_all_f32(tmp_path):
    given = Source(tmp_path, BlockSpec("int4"), embedding=True)
    to_gguf(given.path, tmp_path / "m.gguf", merge="f32", adapter_dir=given.adapter_dir)
    assert {tensor.type for tensor in open_gguf(tmp_path / "m.gguf").tensors.values()} == {GgmlType.F32}
    to_gguf(given.path, tmp_path / "h.gguf", merge="f16")
    assert open_gguf(tmp_path / "h.gguf").tensors["token_embd.weight"].type is GgmlType.Q8_0


# --- the way there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"profile": "stock"}, {"merge": "bf16"}, {"separate_adapter": True}])
def test_plan_tells_the_truth_and_writes_nothing(tmp_path, source, options):
    given = source("nf4")
    plan = plan_gguf(given.path, tmp_path / "x.gguf", adapter_dir=given.adapter_dir, **options)
    assert list(tmp_path.iterdir()) == []
    result = to_gguf(given.path, tmp_path / "x.gguf", adapter_dir=given.adapter_dir, **options)
    assert [file.path for file in result.files] == [plan.path(file) for file in plan.files]
    assert [file.nbytes for file in result.files] == [file.nbytes for file in plan.files]
    assert result.bits_per_weight == plan.bits_per_weight


@pytest.mark.parametrize("options", [{}, {"profile": "stock"}])
def test_same_input_same_bytes(tmp_path, source, options):
    given = source("nf4")
    hashes = [
        [file.sha256 for file in to_gguf(given.path, tmp_path / name, **options).files] for name in ("a", "b")
    ]
    if options:
        assert hashes[0] == hashes[1]
        assert (tmp_path / "a" / "Modelfile").read_text() == (tmp_path / "b" / "Modelfile").read_text()
    else:
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_wrong_base_is_refused(tmp_path, source):
    given = source("nf4")
    with pytest.raises(WrongBase, match="another quantised base"):
        to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=source("int4").adapter_dir)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_a_hash_is_noted(tmp_path, source):
    given = source("nf4")
    write_peft_adapter(tmp_path / "a", replace(given.adapter, base_hash=None))
    result = to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=tmp_path / "a")
    assert any("not checked" in note for note in result.notes)


def test_every_source_tensor_is_used_once(tmp_path, source):
    given = source("nf4")
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


def test_an_existing_output_stays(tmp_path, source):
    given = source("nf4")
    (tmp_path / "m.gguf").write_bytes(b"precious")
    with pytest.raises(OutputExists):
        to_gguf(given.path, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"precious"
    to_gguf(given.path, tmp_path / "m.gguf", overwrite=True)
    open_gguf(tmp_path / "m.gguf")


def test_a_full_disk_is_refused_first(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PreflightRefused, match="not enough disk space"):
        to_gguf(source("nf4").path, tmp_path / "m.gguf")
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
    ],
)
def test_contradictions_are_refused(tmp_path, source, options, message):
    with pytest.raises(UsageError, match=message):
        to_gguf(source("nf4").path, tmp_path / "m.gguf", **options)


def test_a_wrong_file_is_rejected(tmp_path, source, monkeypatch):
    """A writer that flips one bit is found by the read-back; the file does not keep its name."""
    write = convert.write_gguf

    def flip(path, metadata, tensors, **options):
        first = tensors[0]

        def load():
            data = first.load().copy()
            data.view(np.uint8).reshape(-1)[5] ^= 1
            return data

        write(path, metadata, [replace(first, load=load), *tensors[1:]], **options)

    monkeypatch.setattr(convert, "write_gguf", flip)
    for options, output in (({}, "m.gguf"), ({"profile": "stock"}, "pair"), ({"merge": "f16"}, "f.gguf")):
        with pytest.raises(ParityFailed):
            to_gguf(source("int4").path, tmp_path / output, **options)
        assert not (tmp_path / output).exists()
        assert (tmp_path / f"{output}.rejected").exists()


_CHILD = """
import sys, time
from irq_export.export.gguf import to_gguf
def stop(done, total, name):
    if name == sys.argv[4]:
        print("here", flush=True)
        time.sleep(60)
to_gguf(sys.argv[1], sys.argv[2], profile=sys.argv[3], progress=stop)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    ("profile", "tensor"), [("irq", "blk.1.ffn_up.codes"), ("stock", "blk.0.attn_v.weight.lora_b")]
)
def test_a_killed_export_leaves_nothing_under_its_name(tmp_path, source, profile, tensor, signum):
    command = [sys.executable, "-c", _CHILD, str(source("nf4").path), str(tmp_path / "out"), profile, tensor]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        child.send_signal(signum)
        assert child.wait(20) != 0
    assert not (tmp_path / "out").exists()
    if signum == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []
    to_gguf(source("nf4").path, tmp_path / "out", profile=profile)  # a partial is in nobody's way


def test_pair_has_a_manifest_and_a_modelfile(tmp_path, source):
    given = source("int4")
    to_gguf(given.path, tmp_path / "pair", profile="stock")
    manifest = check_manifest(tmp_path / "pair")
    assert set(manifest["files"]) == {"base.gguf", "adapter.gguf", "Modelfile"}
    assert manifest["extra"]["base_hash"] == given.base_hash
    lines = (tmp_path / "pair" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./base.gguf"
    assert "ADAPTER ./adapter.gguf" in lines


# --- command line ------------------------------------------------------------------------------------


def test_command_line(tmp_path, source, repo):
    given, output = source("nf4"), tmp_path / "m.gguf"
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
    wrong = [*call[:3], str(tmp_path / "w.gguf"), "--adapter-dir", str(source("int4").adapter_dir)]
    assert CliRunner().invoke(main, wrong).exit_code == 3
    assert CliRunner().invoke(main, [*call, "--force", "--adapter", "merge"]).exit_code == 2


def test_inspect(tmp_path, source):
    given = source("nf4")
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


def test_exporting_needs_no_torch(tmp_path, source):
    code = (
        "import sys, irq_export; irq_export.to_gguf(*sys.argv[1:]); import irq_export.inspect;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code, source("nf4").path, tmp_path / "m.gguf"], check=False)
    assert done.returncode == 0
    assert irq_export.to_gguf is to_gguf


def test_block_tensors_of_the_fixture_differ(source):
    """The tests above would be blind if all blocks were alike."""
    tensor: BlockTensor = source("nf4").tensors["model.layers.0.self_attn.q_proj"]
    assert len(np.unique(tensor.scale())) > 100
    assert len(np.unique(tensor.tau())) > 100
