"""Folded adapters in stock PEFT: the same logits, nothing missing, nothing left over."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from tiny_checkpoints import write_tiny_checkpoint
from tiny_models import tiny_model, tiny_tokens
from tolerance import FOLD_PEFT_LOGITS
from torch import Tensor, nn

from irq_export.cli.fold_adapter import command
from irq_export.export.fold_adapter import add_tau, fold_adapter
from irq_export.iec import attach, detach, random_adapter
from irq_export.quantizer import load_model
from irq_formats.adapter import Adapter, LoraLayer, delta_weight, random_layer
from irq_formats.blocks import BlockSpec, BlockTensor, encode
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import OutputExists, WrongBase
from irq_formats.manifest import check_manifest
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter

# PEFT 0.21 on transformers 5.23 reads a property that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def load_in_peft(model: nn.Module, directory: Path) -> PeftModel:
    """Load with stock PEFT and check that file and model agree on every key, shape and value."""
    peft_model = PeftModel.from_pretrained(model, directory)
    stored = load_file(directory / "adapter_model.safetensors")
    loaded = {
        name.replace(".default", ""): tensor
        for name, tensor in peft_model.state_dict().items()
        if "lora_" in name
    }
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name
    return peft_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [8, 12, 5])  # 8 divides 128, 192, 64; 12 does not divide 128; 5 nothing
def test_folded_adapter_in_stock_peft(tmp_path: Path, tied: bool, rank: int):
    model = tiny_model(tied=tied)
    tokens = tiny_tokens(model)
    adapter = random_adapter(model, rank=rank, alpha=16.0, seed=rank, base_hash="ab" * 32)
    write_peft_adapter(tmp_path / "iec", adapter)

    plain = logits(model, tokens)
    attach(model, read_peft_adapter(tmp_path / "iec"))
    want = logits(model, tokens)
    detach(model)

    result = fold_adapter(tmp_path / "iec", tmp_path / "folded")
    assert (result.layers, result.folded, result.with_tau, result.max_rank) == (14, 14, 0, rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = logits(load_in_peft(model, tmp_path / "folded"), tokens)
    assert relative(got, want) < FOLD_PEFT_LOGITS
    assert relative(plain, want) > 0.01  # the adapter does something


def test_stock_peft_drops_the_betas_of_an_unfolded_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The trap that fold-adapter is for: PEFT loads the file, without its betas. Ours at least warns."""
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORA, LoraConfig)  # no peft_iec
    model = tiny_model()
    tokens = tiny_tokens(model)
    adapter = random_adapter(model, seed=1)
    write_peft_adapter(tmp_path / "iec", adapter)
    attach(model, adapter)
    want = logits(model, tokens)
    detach(model)
    attach(model, without_betas(adapter))
    without = logits(model, tokens)
    detach(model)
    with pytest.warns(UserWarning, match="irq_iec"):
        peft_model = PeftModel.from_pretrained(model, tmp_path / "iec")
    got = logits(peft_model, tokens)
    assert relative(got, without) < FOLD_PEFT_LOGITS
    assert relative(got, want) > 100 * FOLD_PEFT_LOGITS


def without_betas(adapter: Adapter) -> Adapter:
    layers = {name: replace(layer, beta1=0.0, beta2=0.0) for name, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


def test_mixed_ranks_and_scalings_in_stock_peft(tmp_path: Path):
    """rank_pattern and alpha_pattern carry layers that differ, also scalings that are no short number."""
    model = tiny_model()
    tokens = tiny_tokens(model)
    rng = np.random.default_rng(0)
    layers: dict[str, LoraLayer] = {}
    for i, (name, layer) in enumerate(random_adapter(model).layers.items()):
        if i % 3 != 2:  # some layers have no adapter
            layers[name] = random_layer(layer.shape, 8.0, rng, rank=3 + i, alpha=10.0 / (i + 1))
    adapter = Adapter(layers)
    attach(model, adapter)
    want = logits(model, tokens)
    detach(model)
    write_peft_adapter(tmp_path / "iec", adapter)
    fold_adapter(tmp_path / "iec", tmp_path / "folded")
    peft_model = load_in_peft(model, tmp_path / "folded")
    for name, layer in layers.items():
        module = peft_model.base_model.model.get_submodule(name)
        assert module.scaling["default"] == pytest.approx(layer.scaling, rel=1e-15)
    assert relative(logits(peft_model, tokens), want) < FOLD_PEFT_LOGITS


def test_tau_as_extra_rank_in_stock_peft(tmp_path: Path):
    """PEFT on s·c[q] with tau in the adapter equals the full dequantised model with the adapter."""
    model = tiny_model()
    tokens = tiny_tokens(model)
    adapter = random_adapter(model, rank=12, seed=2)
    skip = "model.layers.1.mlp.down_proj"  # quantised, but without an adapter
    adapter = replace(adapter, layers={k: v for k, v in adapter.layers.items() if k != skip})
    spec = BlockSpec(codebook="nf4", block_size=64, scale="f32", tau="f32")
    rng = np.random.default_rng(3)
    layers = dict(adapter.layers)
    tau_less: dict[str, Tensor] = {}
    for name in [*adapter.layers, skip]:
        weight = model.get_submodule(name).weight
        blocks = weight.detach().numpy().reshape(weight.shape[0], -1, 64)
        tau = (0.3 * rng.standard_normal(blocks.shape[:2]) * blocks.std(-1)).astype(np.float32)
        scale = np.abs(blocks - tau[..., None]).max(-1)
        tensor = encode(weight.detach().numpy(), scale, tau, spec)
        np.testing.assert_array_equal(tensor.tau(), tau)
        tau_less[name] = torch.from_numpy(tensor.dequantize() - np.repeat(tau, 64, axis=1))
        weight.data = torch.from_numpy(tensor.dequantize())
        layers[name] = add_tau(layers.get(name), tau, 64, name)
    attach(model, adapter)
    want = logits(model, tokens)
    detach(model)

    for name, weight in tau_less.items():
        model.get_submodule(name).weight.data = weight
    without_tau = logits(attached(model, adapter), tokens)
    detach(model)
    write_peft_adapter(tmp_path / "tau", Adapter(layers))
    got = logits(load_in_peft(model, tmp_path / "tau"), tokens)
    assert relative(got, want) < FOLD_PEFT_LOGITS
    assert relative(without_tau, want) > 0.01


@pytest.mark.parametrize("spec", [BlockSpec(), BlockSpec("int4", tau="f16")], ids=lambda spec: spec.codebook)
def test_tau_from_a_checkpoint(tmp_path: Path, spec: BlockSpec):
    """A stock PEFT adapter on the dequantised base without tau computes what was trained."""
    blocks = write_tiny_checkpoint(tmp_path / "checkpoint", spec, embedding=True)
    trained = load_model(tmp_path / "checkpoint")
    base_hash = open_checkpoint(tmp_path / "checkpoint").base_hash
    tokens = tiny_tokens(trained)
    partly = random_adapter(trained, rank=12, seed=5, select=lambda name: "o_proj" not in name)
    write_peft_adapter(tmp_path / "iec", replace(partly, base_hash=base_hash))
    attach(trained, partly)
    want = logits(trained, tokens)

    result = fold_adapter(tmp_path / "iec", tmp_path / "out", tau_from=tmp_path / "checkpoint")
    # 7 linears in each of 2 layers have tau, o_proj no adapter; the int8 head has an adapter but no tau
    assert (result.layers, result.folded, result.with_tau) == (15, 13, 14)
    assert result.max_rank == 12 + 192 // 64
    assert result.base_checked

    base = load_model(tmp_path / "checkpoint").dequantize()
    for name, tensor in blocks.items():
        parts = {part: array for part, array in tensor.parts.items() if not part.startswith("tau")}
        tau_less = BlockTensor(replace(tensor.spec, tau="none"), tensor.shape, parts)
        base.get_submodule(name).weight.data = torch.from_numpy(tau_less.dequantize())
    assert relative(logits(base, tokens), want) > 0.01
    assert relative(logits(load_in_peft(base, tmp_path / "out"), tokens), want) < FOLD_PEFT_LOGITS
    assert adapter_config(tmp_path / "out")["rank_pattern"]


def adapter_config(directory: Path) -> dict[str, object]:
    return json.loads((directory / "adapter_config.json").read_text())


def test_uniform_rank_needs_no_patterns(tmp_path: Path):
    model = tiny_model()
    tokens = tiny_tokens(model)
    layers = {
        name: random_layer(layer.shape, 8.0, np.random.default_rng(i), rank=3 + i, alpha=10.0)
        for i, (name, layer) in enumerate(random_adapter(model).layers.items())
    }
    adapter = Adapter(layers)
    want = logits(attached(model, adapter), tokens)
    detach(model)
    write_peft_adapter(tmp_path / "iec", adapter)
    fold_adapter(tmp_path / "iec", tmp_path / "out", uniform_rank=True)
    config = adapter_config(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == 16
    assert relative(logits(load_in_peft(model, tmp_path / "out"), tokens), want) < FOLD_PEFT_LOGITS


def test_tau_from_needs_the_base_of_the_adapter(tmp_path: Path):
    write_tiny_checkpoint(tmp_path / "checkpoint")
    adapter = random_adapter(tiny_model())
    fold = partial(fold_adapter, output_dir=tmp_path / "out", tau_from=tmp_path / "checkpoint")
    write_peft_adapter(tmp_path / "other", replace(adapter, base_hash="ab" * 32))
    with pytest.raises(WrongBase, match="another quantised base"):
        fold(tmp_path / "other")
    small = random_adapter(tiny_model(hidden_size=64))
    write_peft_adapter(tmp_path / "small", small)
    with pytest.raises(WrongBase, match="does not fit the base"):
        fold(tmp_path / "small")
    deep = random_adapter(tiny_model(num_hidden_layers=3))
    write_peft_adapter(tmp_path / "deep", deep)
    with pytest.raises(WrongBase, match="does not have"):
        fold(tmp_path / "deep")
    assert not (tmp_path / "out").exists()
    # an adapter that records no base can be folded, and says that nothing was compared
    write_peft_adapter(tmp_path / "unknown", adapter)
    assert not fold(tmp_path / "unknown").base_checked
    # the result belongs on a base without tau: taken for an ordinary adapter of this one, it is refused
    with pytest.raises(WrongBase, match="another quantised base"):
        fold_adapter(tmp_path / "out", tmp_path / "twice", tau_from=tmp_path / "checkpoint")


def attached(model: nn.Module, adapter: Adapter) -> nn.Module:
    attach(model, adapter)
    return model


def test_result_is_a_plain_complete_directory(tmp_path: Path):
    adapter = random_adapter(tiny_model(), base_hash="ab" * 32)
    write_peft_adapter(tmp_path / "iec", adapter, base_model_name="some/model")
    fold_adapter(tmp_path / "iec", tmp_path / "out")
    check_manifest(tmp_path / "out")
    config = adapter_config(tmp_path / "out")
    assert "irq_iec" not in config
    assert config["base_model_name_or_path"] == "some/model"
    folded = read_peft_adapter(tmp_path / "out")
    assert not folded.has_iec
    assert folded.base_hash == adapter.base_hash
    for name, layer in adapter.layers.items():
        want = delta_weight(layer)
        np.testing.assert_allclose(delta_weight(folded.layers[name]), want, atol=1e-7 * np.abs(want).max())
    with pytest.raises(OutputExists):
        fold_adapter(tmp_path / "iec", tmp_path / "out")
    fold_adapter(tmp_path / "out", tmp_path / "again")  # folding twice changes nothing
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_tau_of_another_shape_is_refused():
    layer = random_layer((8, 64), 1.0, np.random.default_rng(0), rank=2)
    with pytest.raises(WrongBase, match=r"some\.module.*\(8, 128\).*\(8, 64\)"):
        add_tau(layer, np.zeros((8, 2), np.float32), 64, "some.module")


def test_command_line(tmp_path: Path):
    write_peft_adapter(tmp_path / "iec", random_adapter(tiny_model(), rank=5))
    arguments = [str(tmp_path / "iec"), "-o", str(tmp_path / "out")]
    first = CliRunner().invoke(command, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)
    assert result["folded"] == result["layers"] == 14
    assert result["max_rank"] == 5
    assert CliRunner().invoke(command, arguments).exit_code == OutputExists.exit_code
    forced = CliRunner().invoke(command, [*arguments, "--force"])
    assert forced.exit_code == 0
    assert "folded: 14" in forced.stdout
    missing = CliRunner().invoke(command, [str(tmp_path), "-o", str(tmp_path / "x")])
    assert missing.exit_code == 3
    assert "configuration is missing" in missing.stderr
