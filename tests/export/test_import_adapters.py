"""Adapters whose base is not stored (the released IR-QLoRA code) or that become offsets (QA-LoRA)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from irq_export.export.gguf import to_gguf
from irq_export.importers.pooled import pooled_offsets
from irq_export.importers.run import import_checkpoint
from irq_export.quantize_model import quantize
from irq_formats.adapter import Adapter, LoraLayer, branch
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import UnsupportedModel, UsageError, WrongBase
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter
from tests.tiny_checkpoints import write_tiny_checkpoint
from tests.tiny_models import save_tiny_model
from tests.tolerance import FOLD_FLOAT64


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A floating-point model and an adapter as PEFT 0.6.2 saves the released code's parameters."""
    folder = tmp_path_factory.mktemp("released")
    model = save_tiny_model(folder / "float", "llama")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    adapted.save_pretrained(folder / "adapter")
    weights = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    stems = sorted({name.rpartition(".lora_A")[0] for name in tensors if ".lora_A" in name})
    for i, stem in enumerate(stems):
        tensors[f"{stem}.lora_default_A_scale"] = torch.tensor([0.1 * (i + 1)])
        tensors[f"{stem}.lora_default_B_scale"] = torch.tensor([-0.2])
    save_file(tensors, weights)
    return folder / "float", folder / "adapter"


def test_the_base_of_a_released_adapter_is_searched_again(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    model, adapter = released
    report = import_checkpoint(model, tmp_path / "out", adapter=adapter)
    assert report.kind == "released"
    assert any("never stored" in message for message in report.messages)
    quantize(
        model, tmp_path / "same", numerics="reference", tie="first", refine="none", scale_rounding="none"
    )
    assert report.base_hash == open_checkpoint(tmp_path / "same").base_hash
    written = read_peft_adapter(tmp_path / "out" / "adapter")
    assert written.base_hash == report.base_hash
    assert len(written.layers) == report.adapter == 4
    assert sorted(round(layer.beta1, 3) for layer in written.layers.values()) == [0.1, 0.2, 0.3, 0.4]
    assert {round(layer.beta2, 3) for layer in written.layers.values()} == {-0.2}
    to_gguf(tmp_path / "out", tmp_path / "m.gguf")


def test_no_base_is_left_without_its_adapter(released: tuple[Path, Path], tmp_path: Path) -> None:
    """A failure (or a kill) after the search leaves nothing that looks complete."""
    model, adapter = released
    bound = tmp_path / "bound"
    shutil.copytree(adapter, bound)
    weights = bound / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"irq.base_hash": "ab" * 32})
    with pytest.raises(WrongBase):
        import_checkpoint(model, tmp_path / "out", adapter=bound)
    assert [path.name for path in tmp_path.iterdir()] == ["bound"]


def test_a_floating_point_model_alone_is_no_import(released: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to import"):
        import_checkpoint(released[0], tmp_path / "out")


# --- pooled adapters -----------------------------------------------------------------------------------


def pooled_layer(shape: tuple[int, int], group: int, rank: int = 2, seed: int = 0) -> LoraLayer:
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 0.1, (rank, shape[1] // group)).astype(np.float32)
    b = rng.normal(0, 0.1, (shape[0], rank)).astype(np.float32)
    return LoraLayer(a, b, scaling=0.5)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_folded_offsets_are_the_exact_ones_rounded_once(pooling: str, tmp_path: Path) -> None:
    tensors = write_tiny_checkpoint(tmp_path / "base", BlockSpec("int4", 32))
    layers = {m: pooled_layer(t.shape, 32, seed=i) for i, (m, t) in enumerate(tensors.items())}
    base_hash = open_checkpoint(tmp_path / "base").base_hash
    write_peft_adapter(tmp_path / "adapter", Adapter(layers, base_hash))
    report = import_checkpoint(
        tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", pooling=pooling
    )
    assert (report.kind, report.adapter) == ("pooled", len(layers))
    folded = open_checkpoint(tmp_path / "out")
    assert folded.base_hash != base_hash
    assert folded.adapter_dir is None
    for module, before in tensors.items():
        after, layer = folded.block_tensor(module), layers[module]
        product = layer.lora_b.astype(np.float64) @ layer.lora_a.astype(np.float64)
        exact = before.tau() + layer.scaling * product / (32 if pooling == "mean" else 1)
        half_ulp = np.spacing(np.abs(after.tau())) / 2
        assert (np.abs(after.tau() - exact) <= half_ulp * (1 + 1e-6)).all()
        np.testing.assert_array_equal(after.codes(), before.codes())
        np.testing.assert_array_equal(after.scale(), before.scale())
        assert np.abs(exact - before.tau()).max() > 1e-4


@pytest.mark.parametrize(("group", "block"), [(64, 64), (128, 64), (64, 32)])
def test_a_pooled_branch_is_its_offsets(group: int, block: int) -> None:
    """x pooled, then A and B, with both elastic connections, against the offsets times block sums of x."""
    shape, rank = (48, 512), 4  # in / r = 128: whole groups
    rng = np.random.default_rng(3)
    layer = replace(pooled_layer(shape, group, rank), beta1=0.3, beta2=-0.2)
    x = rng.normal(size=(5, shape[1]))
    whole = replace(
        layer,
        lora_a=np.repeat(layer.lora_a.astype(np.float64), group, 1),
        lora_b=layer.lora_b.astype(np.float64),
    )
    expected = branch(whole, x)  # sum-pooling is a matrix with equal columns; the connection sees raw x
    offsets = pooled_offsets(layer, shape, block, "sum", "m")
    got = x.reshape(5, -1, block).sum(-1) @ offsets.T
    assert np.abs(got - expected).max() <= FOLD_FLOAT64 * np.abs(expected).max() * 10


def test_what_has_no_place_in_the_offsets(tmp_path: Path) -> None:
    layer = pooled_layer((48, 192), 64, rank=8)
    with pytest.raises(UnsupportedModel, match="does not follow"):
        pooled_offsets(replace(layer, beta1=0.1), (48, 192), 64, "sum", "m")
    pooled_offsets(replace(layer, beta2=0.1), (48, 192), 64, "sum", "m")
    with pytest.raises(UnsupportedModel, match="whole number of blocks"):
        pooled_offsets(pooled_layer((48, 192), 32), (48, 192), 64, "sum", "m")
    with pytest.raises(WrongBase, match="does not fit"):
        pooled_offsets(layer, (50, 192), 64, "sum", "m")


def test_pooled_refusals(tmp_path: Path) -> None:
    tensors = write_tiny_checkpoint(tmp_path / "base", BlockSpec("int4", 64))
    module = "model.layers.0.self_attn.q_proj"
    layer = pooled_layer(tensors[module].shape, 64)
    write_peft_adapter(tmp_path / "adapter", Adapter({module: layer}, None))
    with pytest.raises(UsageError, match="how the adapter pools"):
        import_checkpoint(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    with pytest.raises(UsageError, match="checkpoint already"):
        import_checkpoint(tmp_path / "base", tmp_path / "out")
    write_peft_adapter(tmp_path / "other", Adapter({module: layer}, "ab" * 32))
    with pytest.raises(WrongBase):
        import_checkpoint(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "other", pooling="sum")
    assert not (tmp_path / "out").exists()
