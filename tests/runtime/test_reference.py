"""The reference runtime against transformers, in float64 and float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from irq_formats.adapter import LoraLayer, delta_weight, random_layer, tau_extra_rank
from irq_formats.blocks import BlockSpec, encode_int8
from irq_formats.errors import MalformedFile, UsageError, WrongBase
from irq_formats.names import gguf_to_hf, hf_to_gguf
from irq_runtime.reference import ReferenceModel, load_model
from irq_runtime.weights import Weights, open_weights
from tests.model_cases import nmse
from tests.tiny_files import (
    BASE_HASH,
    block_tensors,
    write_irq,
    write_irq_adapter,
    write_stock,
    write_stock_adapter,
)
from tests.tiny_models import tiny_model, tiny_tokens
from tests.tolerance import NMSE_FLOAT32, NMSE_FLOAT64, NMSE_SUM_ORDER


def torch_logits(model: PreTrainedModel, tokens: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    with torch.no_grad():
        return model.to(dtype)(tokens).logits[0].numpy()


def load_weights(model: PreTrainedModel, weights: dict[str, np.ndarray]) -> None:
    """Replace linear weights by HF module name."""
    with torch.no_grad():
        for module, weight in weights.items():
            model.get_submodule(module).weight.copy_(torch.from_numpy(weight))


class TestStock:
    def test_float64_equals_transformers(self, model: PreTrainedModel, tmp_path: Path) -> None:
        write_stock(tmp_path / "m.gguf", model)
        tokens = tiny_tokens(model, 200)
        got = load_model(tmp_path / "m.gguf").logits(tokens[0].tolist())
        assert got.dtype == np.float64
        assert nmse(got, torch_logits(model, tokens, torch.float64)) < NMSE_FLOAT64

    def test_float32_equals_transformers(self, model: PreTrainedModel, tmp_path: Path) -> None:
        write_stock(tmp_path / "m.gguf", model)
        tokens = tiny_tokens(model, 64)
        got = load_model(tmp_path / "m.gguf").logits(tokens[0].tolist(), dtype=np.float32)
        assert got.dtype == np.float32
        assert nmse(got, torch_logits(model, tokens, torch.float32)) < NMSE_FLOAT32

    def test_stepping_equals_the_whole(self, model: PreTrainedModel, tmp_path: Path) -> None:
        write_stock(tmp_path / "m.gguf", model)
        reference = load_model(tmp_path / "m.gguf")
        tokens = tiny_tokens(model, 140)[0].tolist()  # more than one chunk of queries
        cache = reference.new_cache()
        parts = [reference.step(tokens[:130], cache)]
        parts += [reference.step([token], cache) for token in tokens[130:]]
        assert nmse(np.concatenate(parts), reference.logits(tokens)) < NMSE_SUM_ORDER

    def test_adapter_scaling(self, tmp_path: Path) -> None:
        """alpha / rank, 1 for alpha 0, times the user's scale."""
        model = tiny_model()
        write_stock(tmp_path / "m.gguf", model)
        layer = random_layer((128, 128), 10.0, np.random.default_rng(0), rank=4)
        tokens = tiny_tokens(model)
        for alpha, user, expected in [(0.0, 1.0, 1.0), (2.0, 1.0, 0.5), (0.0, 0.5, 0.5)]:
            path = tmp_path / f"a{alpha}.gguf"
            path.unlink(missing_ok=True)
            pair = (layer.lora_a, layer.lora_b)
            write_stock_adapter(path, "llama", {"blk.1.attn_output": pair}, alpha)
            got = load_model(tmp_path / "m.gguf", path, user).logits(tokens[0].tolist())
            merged = tiny_model(dtype=torch.float64)
            linear = merged.model.layers[1].self_attn.o_proj
            with torch.no_grad():
                delta = layer.lora_b.astype(np.float64) @ layer.lora_a.astype(np.float64)
                linear.weight += expected * torch.from_numpy(delta)
            assert nmse(got, torch_logits(merged, tokens, torch.float64)) < NMSE_FLOAT64

    def test_tau_as_extra_rank(self, tmp_path: Path) -> None:
        """A base without tau plus the pair of tau_extra_rank equals the whole quantised model."""
        model = tiny_model()
        blocks = block_tensors(model, BlockSpec("int4"))
        weights, pairs = {}, {}
        for module, tensor in blocks.items():
            tau = tensor.tau()
            weights[module] = tensor.dequantize()
            pairs[hf_to_gguf(module)] = tau_extra_rank(None, tau, 64)
        bare = {
            f"{hf_to_gguf(module)}.weight": tensor.spec.codec.decode(
                tensor.codes(), tensor.scale(), np.zeros_like(tensor.tau())
            )
            for module, tensor in blocks.items()
        }
        write_stock(tmp_path / "m.gguf", model, lambda name, array: bare.get(name, array))
        for name, heads in (("attn_q", 4), ("attn_k", 2)):
            for layer in range(2):
                a, b = pairs[f"blk.{layer}.{name}"]
                rows = b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
                pairs[f"blk.{layer}.{name}"] = (a, rows)
        write_stock_adapter(tmp_path / "a.gguf", "llama", pairs, 0.0)
        load_weights(model, weights)
        tokens = tiny_tokens(model)
        expected = torch_logits(model, tokens, torch.float64)
        ids = tokens[0].tolist()
        got = load_model(tmp_path / "m.gguf", tmp_path / "a.gguf").logits(ids)
        assert nmse(got, expected) < NMSE_FLOAT64
        without = load_model(tmp_path / "m.gguf", tmp_path / "a.gguf", 0.0).logits(ids)
        assert nmse(without, expected) > 1e-4  # the test can fail: tau matters


class TestIrq:
    @pytest.mark.parametrize(
        ("family", "codebook"),
        [("llama", "nf4"), ("llama", "nf3"), ("qwen2", "nf2"), ("qwen3", "int4"), ("llama", "int2")],
    )
    def test_blocks_and_iec(self, family: str, codebook: str, tmp_path: Path) -> None:
        model = tiny_model(family, attn_implementation="sdpa")
        blocks = block_tensors(model, BlockSpec(codebook))
        rng = np.random.default_rng(1)
        adapter = {
            module: random_layer(t.shape, float(np.linalg.norm(t.dequantize())), rng, rank=12)
            for module, t in blocks.items()
        }
        write_irq(tmp_path / "m.gguf", model, blocks, adapter)
        tokens = tiny_tokens(model, 100)
        got = load_model(tmp_path / "m.gguf").logits(tokens[0].tolist())
        load_weights(model, {module: t.dequantize() for module, t in blocks.items()})
        model = model.double()
        base = torch_logits(model, tokens, torch.float64)
        with torch.no_grad():
            for module, layer in adapter.items():
                model.get_submodule(module).weight += torch.from_numpy(delta_weight(layer))
        assert nmse(got, torch_logits(model, tokens, torch.float64)) < NMSE_FLOAT64
        assert nmse(got, base) > 1e-6  # the adapter matters

    def test_weights_are_bit_equal(self, tmp_path: Path) -> None:
        model = tiny_model()
        blocks = block_tensors(model, BlockSpec("nf4"))
        write_irq(tmp_path / "m.gguf", model, blocks)
        weights: Weights = load_model(tmp_path / "m.gguf").weights
        for module, tensor in blocks.items():
            name = f"{hf_to_gguf(module)}.weight"
            assert np.array_equal(weights.tensor(name, np.float32), tensor.dequantize())
            assert gguf_to_hf(name) == f"{module}.weight"

    @pytest.mark.parametrize("tied", [True, False])
    def test_int8_embedding(self, tied: bool, tmp_path: Path) -> None:
        model = tiny_model(tied=tied)
        embedding = encode_int8(model.model.embed_tokens.weight.detach().numpy())
        blocks = {"model.embed_tokens": embedding, **block_tensors(model, BlockSpec("nf4"))}
        write_irq(tmp_path / "m.gguf", model, blocks)
        load_weights(model, {module: t.dequantize() for module, t in blocks.items()})
        tokens = tiny_tokens(model)
        got = load_model(tmp_path / "m.gguf").logits(tokens[0].tolist())
        assert nmse(got, torch_logits(model, tokens, torch.float64)) < NMSE_FLOAT64

    def test_separate_adapter(self, tmp_path: Path) -> None:
        model = tiny_model()
        blocks = block_tensors(model, BlockSpec("nf4"))
        layer = random_layer((128, 128), 10.0, np.random.default_rng(0))
        adapter = {"model.layers.0.self_attn.o_proj": layer}
        write_irq(tmp_path / "both.gguf", model, blocks, adapter)
        write_irq(tmp_path / "m.gguf", model, blocks)
        write_irq_adapter(tmp_path / "a.gguf", adapter, BASE_HASH)
        ids = tiny_tokens(model)[0].tolist()
        embedded = load_model(tmp_path / "both.gguf").logits(ids)
        separate = load_model(tmp_path / "m.gguf", tmp_path / "a.gguf").logits(ids)
        assert np.array_equal(embedded, separate)
        assert not np.array_equal(embedded, load_model(tmp_path / "m.gguf").logits(ids))
        with pytest.raises(UsageError, match="embeds an adapter"):
            load_model(tmp_path / "both.gguf", tmp_path / "a.gguf")
        with pytest.raises(UsageError, match="is an adapter"):
            load_model(tmp_path / "a.gguf")

    def test_adapter_of_another_base(self, tmp_path: Path) -> None:
        model = tiny_model()
        write_irq(tmp_path / "m.gguf", model, block_tensors(model, BlockSpec("nf4")))
        layer = LoraLayer(np.ones((1, 128), np.float32), np.ones((128, 1), np.float32))
        adapter = {"model.layers.0.self_attn.o_proj": layer}
        write_irq_adapter(tmp_path / "a.gguf", adapter, "cd" * 32)
        with pytest.raises(WrongBase):
            load_model(tmp_path / "m.gguf", tmp_path / "a.gguf")

    def test_adapter_that_does_not_fit(self, tmp_path: Path) -> None:
        model = tiny_model()
        write_irq(tmp_path / "m.gguf", model, block_tensors(model, BlockSpec("nf4")))
        layer = LoraLayer(np.ones((1, 128), np.float32), np.ones((64, 1), np.float32))
        adapter = {"model.layers.0.self_attn.o_proj": layer}
        write_irq_adapter(tmp_path / "a.gguf", adapter, BASE_HASH)
        with pytest.raises(MalformedFile, match="does not fit"):
            load_model(tmp_path / "m.gguf", tmp_path / "a.gguf")


def test_tokens_are_checked(tmp_path: Path) -> None:
    model = tiny_model()
    write_stock(tmp_path / "m.gguf", model)
    reference = load_model(tmp_path / "m.gguf")
    for tokens in ([], [259], [-1]):
        with pytest.raises(UsageError):
            reference.logits(tokens)


def test_cache_of_weights_stays_within_its_budget(tmp_path: Path) -> None:
    model = tiny_model()
    write_stock(tmp_path / "m.gguf", model)
    tight = ReferenceModel(open_weights(tmp_path / "m.gguf", cache_bytes=1))
    ids = tiny_tokens(model)[0].tolist()
    assert np.array_equal(tight.logits(ids), load_model(tmp_path / "m.gguf").logits(ids))
    assert tight.weights.cached_tensors == 1
