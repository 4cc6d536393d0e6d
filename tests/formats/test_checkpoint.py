"""Checkpoints: what is written comes back bit for bit, and nothing damaged is ever opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_tiny_checkpoint

from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import (
    CHECKPOINT_KIND,
    Checkpoint,
    base_hash,
    hash_line,
    hf_tensor_shapes,
    open_checkpoint,
)
from irq_formats.checkpoint_writer import checkpoint_writer
from irq_formats.errors import IrqError, MalformedFile, OutputExists, UnsupportedModel, UsageError
from irq_formats.manifest import write_manifest
from irq_formats.safetensors_io import TensorSpec, open_safetensors, write_safetensors

Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "good"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json and make the manifest agree."""
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    hashed = config.get("quantization_config", {}).get("base_hash")
    write_manifest(path, {"kind": CHECKPOINT_KIND, "base_hash": hashed})


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors and make the manifest agree."""
    file = open_safetensors(path / WEIGHTS)
    tensors = {name: file.read(name) for name in file.tensors}
    change(tensors)
    write_safetensors(path / WEIGHTS, tensors, overwrite=True)
    edit_config(path, lambda config: None)


def seal(path: Path) -> None:
    """Make base hash and manifest fit the tensors, as a writer that knows no better would."""
    file = open_safetensors(path / WEIGHTS)
    lines = [hash_line(n, r.dtype, r.shape, file.read(n)) for n, r in file.tensors.items()]
    digest = base_hash(lines, open_checkpoint(path, verify=False).quantization.modules)
    edit_config(path, lambda config: config["quantization_config"].update(base_hash=digest))


def same(checkpoint: Checkpoint, expected: dict[str, Any]) -> bool:
    for module, tensor in expected.items():
        read = checkpoint.block_tensor(module)
        assert read.spec == tensor.spec
        for name, part in tensor.parts.items():
            assert read.parts[name].dtype == part.dtype
            assert read.parts[name].tobytes() == part.tobytes()
    return True


@pytest.mark.parametrize("shard_bytes", [1 << 28, 40_000, 1])
@pytest.mark.parametrize(
    "spec",
    [
        BlockSpec(),
        BlockSpec("nf3", 32, "f16", "f16"),
        BlockSpec("int2", 64, "dq8", "f32", "none"),
        BlockSpec("nf2", 64, "f32", "none"),
    ],
    ids=lambda spec: spec.codebook,
)
def test_round_trip(tmp_path: Path, spec: BlockSpec, shard_bytes: int) -> None:
    written = write_tiny_checkpoint(tmp_path / "c", spec, embedding=True, shard_bytes=shard_bytes)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert set(checkpoint.blocks) == set(written)
    assert same(checkpoint, written)
    names = hf_tensor_shapes(checkpoint.model)
    assert set(checkpoint.plain) == {name for name in names if name.endswith("norm.weight")}
    assert checkpoint.plain_f32("model.norm.weight").shape == (128,)
    assert checkpoint.adapter_dir is None
    assert (tmp_path / "c" / WEIGHTS).exists() == (shard_bytes == 1 << 28)
    assert not list((tmp_path / "c").glob("shard-*"))


def test_safetensors_reads_it_too(good: Path) -> None:
    from safetensors.numpy import load_file

    ours = open_safetensors(good / WEIGHTS)
    theirs = load_file(good / WEIGHTS)
    assert set(theirs) == set(ours.tensors)
    assert all((ours.read(name) == array).all() for name, array in theirs.items())


def test_sharding_changes_nothing_but_the_files(good: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", shard_bytes=40_000)
    assert open_checkpoint(tmp_path / "c").base_hash == open_checkpoint(good).base_hash


def test_same_input_same_bytes(good: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c")
    assert (tmp_path / "c" / "manifest.json").read_bytes() == (good / "manifest.json").read_bytes()


def test_base_hash_is_the_specified_one(good: Path) -> None:
    import hashlib

    file = open_safetensors(good / WEIGHTS)
    lines = []
    for name, ref in file.tensors.items():
        shape = ",".join(str(n) for n in ref.shape)
        lines.append(f"{name} {ref.dtype} {shape} {hashlib.sha256(file.read(name).tobytes()).hexdigest()}\n")
    lines += [f"{module} nf4 64 dq8 dq8 fp16\n" for module in open_checkpoint(good).blocks]
    assert hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() == open_checkpoint(good).base_hash


def test_base_hash_tells_specs_and_bytes_apart() -> None:
    line = hash_line("a.codes", "U8", (2,), np.array([1, 2], np.uint8))
    other = hash_line("a.codes", "U8", (2,), np.array([1, 3], np.uint8))
    pairs = [(line, BlockSpec()), (other, BlockSpec()), (line, BlockSpec("int4"))]
    assert len({base_hash([tensor], {"a": spec}) for tensor, spec in pairs}) == 3


def test_plain_tensors_keep_their_bits(tmp_path: Path) -> None:
    bits = np.arange(128, dtype=np.uint16)
    written = write_tiny_checkpoint(tmp_path / "a")
    source = open_checkpoint(tmp_path / "a")
    with checkpoint_writer(tmp_path / "b") as writer:
        for module, tensor in written.items():
            writer.add_block(module, tensor)
        for name, ref in source.plain.items():
            if name == "model.norm.weight":
                writer.add_plain(TensorSpec(name, "BF16", (128,)), lambda: bits)
            else:
                writer.add_plain(ref, lambda name=name: source.plain_raw(name))
        writer.finish(
            {k: v for k, v in source.config.items() if k != "quantization_config"},
            spec=BlockSpec(),
            skipped={},
            search={},
        )
    back = open_checkpoint(tmp_path / "b")
    assert (back.plain_raw("model.norm.weight") == bits).all()
    assert back.plain["model.norm.weight"].dtype == "BF16"


def test_adapter_is_found_and_outside_the_manifest(copy: Path) -> None:
    (copy / "adapter").mkdir()
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    assert open_checkpoint(copy).adapter_dir == copy / "adapter"


def test_existing_output_is_refused_and_kept(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(OutputExists):
        write_tiny_checkpoint(copy)
    assert (copy / "manifest.json").read_bytes() == before


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), checkpoint_writer(tmp_path / "c"):
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="not finished"), checkpoint_writer(tmp_path / "c"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_model_that_was_never_quantised_is_told_what_to_do(copy: Path) -> None:
    edit_config(copy, lambda config: config.pop("quantization_config"))
    (copy / "manifest.json").unlink()
    with pytest.raises(UnsupportedModel, match="irq-export quantize"):
        open_checkpoint(copy)


def test_file_instead_of_a_directory(copy: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        open_checkpoint(copy / "config.json")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(IrqError):
        open_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_flipped_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(MalformedFile):
        open_checkpoint(copy)


def test_no_manifest_is_no_checkpoint(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(MalformedFile, match="manifest"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["extra"].update(kind="irq-stock-pair"), "not of this checkpoint"),
        (lambda m: m["extra"].update(base_hash="0" * 64), "not of this checkpoint"),
        (lambda m: m.update(extra=[]), "not of this checkpoint"),
        (lambda m: m.update(files={}), "does not list all"),
        (lambda m: m["files"].pop("config.json"), "does not list all"),
        (lambda m: m["files"].pop(WEIGHTS), "does not list all"),
    ],
)
def test_a_manifest_that_binds_nothing_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MalformedFile, match=message):
        open_checkpoint(copy)


def test_every_shard_and_the_index_must_be_listed(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", shard_bytes=40_000)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    for name in [name for name in manifest["files"] if name.startswith("model")]:
        files = {other: entry for other, entry in manifest["files"].items() if other != name}
        (tmp_path / "c" / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(MalformedFile, match="does not list all"):
            open_checkpoint(tmp_path / "c")


def test_files_that_came_later_are_told(copy: Path) -> None:
    assert open_checkpoint(copy).unlisted_files == []
    (copy / "README.md").write_text("a card, which nobody reads")
    (copy / "additional_chat_templates").mkdir()
    for name in ("generation_config.json", "additional_chat_templates/rag.jinja"):
        (copy / name).write_text("{}")
    found = open_checkpoint(copy).unlisted_files
    assert found == ["additional_chat_templates/rag.jinja", "generation_config.json"]


def _set(tensors: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
    assert name in tensors
    tensors[name] = array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.scale"), "missing"),
        (lambda t: t.pop("model.norm.weight"), "missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "does not have.*extra"),
        (lambda t: t.update({f"{Q}.weight": np.zeros((128, 128), np.float32)}), "does not have"),
        (lambda t: _set(t, f"{Q}.scale_absmax", t[f"{Q}.scale_absmax"].astype(np.float16)), "F32.*F16"),
        (lambda t: _set(t, f"{Q}.codes", t[f"{Q}.codes"][:-1]), "tensor"),
        (lambda t: _set(t, f"{Q}.codes", t[f"{Q}.codes"].view(np.int8)), "I8"),
        (lambda t: _set(t, "model.norm.weight", np.ones(128, np.float64)), "F64"),
        (lambda t: t[f"{Q}.codes"].__setitem__((0, 0), t[f"{Q}.codes"][0, 0] ^ 1), "base hash"),
    ],
)
def test_wrong_tensors(copy: Path, change: Callable[[dict[str, np.ndarray]], object], message: str) -> None:
    edit_tensors(copy, change)
    with pytest.raises(MalformedFile, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("part", "value"), [("scale_absmax", -1.0), ("tau_absmax", np.nan), ("scale_offset", np.inf)]
)
def test_wrong_values_are_found_when_read(copy: Path, part: str, value: float) -> None:
    edit_tensors(copy, lambda t: t[f"{Q}.{part}"].__setitem__(0, value))
    with pytest.raises(MalformedFile, match=part):
        open_checkpoint(copy, verify=False).block_tensor(Q)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scale_absmax", -1.0, "scale_absmax has a negative value"),
        ("tau_absmax", np.nan, "tau_absmax is not finite"),
        ("scale_offset", -1.0, "scale is negative"),
        ("scale_offset", 1e6, "scale is negative or not finite"),  # beyond fp16
        ("tau_absmax", 0.0, "absmax is 0 has non-zero codes"),
        ("scale_absmax", 0.0, "absmax is 0 has non-zero codes"),
    ],
)
def test_what_the_blocks_specification_forbids_is_never_opened(
    copy: Path, part: str, value: float, message: str
) -> None:
    """Hash and manifest are right, so only the values can tell; no exporter may meet them first."""
    edit_tensors(copy, lambda t: t[f"{Q}.{part}"].__setitem__(..., value))
    seal(copy)
    with pytest.raises(MalformedFile, match=message) as error:
        open_checkpoint(copy)
    assert Q in str(error.value)


@pytest.mark.parametrize("part", ["scale_offset", "tau_absmax"])
def test_states_of_bitsandbytes_move_as_they_are(tmp_path: Path, part: str) -> None:
    """With scale_rounding none, negative scales and other indices of 0 are values that others have made."""
    path = tmp_path / "c"
    write_tiny_checkpoint(path, BlockSpec(scale_rounding="none"))
    edit_tensors(path, lambda t: t[f"{Q}.{part}"].__setitem__(..., -1.0 if part == "scale_offset" else 0.0))
    seal(path)
    assert (open_checkpoint(path).block_tensor(Q).scale() < 0).any() == (part == "scale_offset")


def _q(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda config: change(config["quantization_config"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.pop("quantization_config"), UnsupportedModel),
        (_q(lambda q: q.update(quant_method="gptq")), UnsupportedModel),
        (_q(lambda q: q.update(version=2)), UnsupportedModel),
        (_q(lambda q: q.update(version=True)), MalformedFile),
        (_q(lambda q: q.pop("version")), MalformedFile),
        (_q(lambda q: q.update(surprise=1)), MalformedFile),
        (_q(lambda q: q.pop("skipped")), MalformedFile),
        (_q(lambda q: q.update(skipped={"a": 1})), MalformedFile),
        (_q(lambda q: q.update(search={"a": []})), MalformedFile),
        (_q(lambda q: q.update(modules=[])), MalformedFile),
        (_q(lambda q: q.update(base_hash="0" * 64)), MalformedFile),
        (_q(lambda q: q.update(base_hash="xyz")), MalformedFile),
        (_q(lambda q: q.update(codebook="nf5")), UnsupportedModel),
        (_q(lambda q: q["modules"].pop(Q)), MalformedFile),
        (_q(lambda q: q["modules"].update({"lm_head": q["modules"][Q]})), MalformedFile),
        (_q(lambda q: q["modules"].update({"model.norm": q["modules"][Q]})), MalformedFile),
        (_q(lambda q: q["modules"].update({"model.layers.9.mlp.up_proj": q["modules"][Q]})), MalformedFile),
        (_q(lambda q: q["modules"][Q].update(codebook="int4")), MalformedFile),  # same bytes, other meaning
        (_q(lambda q: q["modules"][Q].update(block_size=32)), MalformedFile),
        (_q(lambda q: q["modules"][Q].update(tau="none")), MalformedFile),
        (_q(lambda q: q["modules"][Q].update(block_size="64")), MalformedFile),
        (_q(lambda q: q["modules"].update({Q: 4})), MalformedFile),
        (lambda c: c.update(hidden_size=256), MalformedFile),
        (lambda c: c.update(num_hidden_layers=3), MalformedFile),
        (lambda c: c.update(tie_word_embeddings=True), MalformedFile),
    ],
)
def test_wrong_config(copy: Path, change: Callable[[dict[str, Any]], object], error: type[IrqError]) -> None:
    edit_config(copy, change)
    with pytest.raises(error):
        open_checkpoint(copy)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_index_may_not_leave_the_directory(tmp_path: Path, shard: str) -> None:
    path = tmp_path / "c"
    write_tiny_checkpoint(path, shard_bytes=40_000)
    shutil.copy(next(path.glob("model-00001*")), tmp_path / "outside.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {k: shard if v == first else v for k, v in index["weight_map"].items()}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_config(path, lambda config: None)
    with pytest.raises(MalformedFile, match="plain file name"):
        open_checkpoint(path)
