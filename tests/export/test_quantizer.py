"""A checkpoint in transformers: the model computes with exactly the decoded weights, in every dtype."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import random_block_tensor, write_tiny_checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from irq_export.block_modules import BlockModule, IrqEmbedding, IrqLinear
from irq_export.iec import attach, random_adapter
from irq_export.quantizer import load_model
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import MalformedFile, UnsupportedModel

SPECS = [
    BlockSpec(codebook, block_size, scale, tau, rounding)
    for codebook in ("nf4", "nf3", "nf2", "int4", "int3", "int2")
    for block_size in (64, 32)
    for scale, tau, rounding in (
        ("dq8", "dq8", "fp16"),
        ("dq8", "none", "none"),
        ("f16", "f16", "fp16"),
        ("f32", "f32", "fp16"),
        ("f16", "none", "fp16"),
    )
] + [BlockSpec("int8", 32, "f16", "none")]
TOKENS = torch.arange(24).reshape(1, 24) * 7 % 259


def linear(tensor: BlockTensor) -> IrqLinear:
    module = IrqLinear(tensor.spec, tensor.shape[1], tensor.shape[0])
    module.load_block(tensor)
    return module


def plain_twin(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """An ordinary transformers model whose weights are the decoded ones, by way of numpy alone."""
    checkpoint = open_checkpoint(path)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    state = {f"{name}.weight": checkpoint.block_tensor(name).dequantize() for name in checkpoint.blocks}
    state |= {name: checkpoint.plain_f32(name) for name in checkpoint.plain}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.codebook}-{s.block_size}-{s.scale}-{s.tau}")
def test_decoding_is_bit_equal(spec: BlockSpec) -> None:
    tensor = random_block_tensor(spec, (37, 192))  # 111 or 222 blocks: a short last group of scales
    decoded = linear(tensor).dequantize().numpy()
    assert decoded.tobytes() == tensor.dequantize().tobytes()


def test_decoding_over_several_groups_and_all_codes_is_bit_equal() -> None:
    rng = np.random.default_rng(0)
    tensor = random_block_tensor(BlockSpec(), (40, 1024))
    parts = {
        name: rng.integers(0, 256, part.shape, dtype=np.uint8) if part.dtype == np.uint8 else part
        for name, part in tensor.parts.items()
    }
    tensor = BlockTensor(tensor.spec, tensor.shape, parts)
    assert linear(tensor).dequantize().numpy().tobytes() == tensor.dequantize().tobytes()


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: copy.deepcopy(m).float(),
    ],
)
def test_casts_leave_the_parts_alone(cast: object) -> None:
    tensor = random_block_tensor(BlockSpec("nf4", 64, "f16", "dq8"), (5, 128))
    module = cast(torch.nn.Sequential(linear(tensor)))[0]  # type: ignore[operator]
    for name, part in tensor.parts.items():
        assert module.get_buffer(name).numpy().tobytes() == part.tobytes()
        assert module.get_buffer(name).numpy().dtype == part.dtype
    assert module.block_tensor().parts.keys() == tensor.parts.keys()


def test_gradients_flow_to_the_input_only() -> None:
    tensor = random_block_tensor(BlockSpec(), (5, 128))
    module = linear(tensor).double()
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    expected = tensor.dequantize().astype(np.float64).sum(axis=0)
    assert np.allclose(x.grad.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert list(module.parameters()) == []


@pytest.mark.parametrize("spec", [BlockSpec("nf4", 32), SPECS[-1], BlockSpec("nf3", 64, "f16", "none")])
def test_embedding_decodes_rows(spec: BlockSpec) -> None:
    tensor = random_block_tensor(spec, (50, 64))
    module = IrqEmbedding(tensor.spec, 50, 64)
    module.load_block(tensor)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert module(ids).numpy().tobytes() == tensor.dequantize()[ids.numpy()].tobytes()
    assert module(ids[:0]).shape == (0, 2, 64)
    assert module.double()(ids).dtype == torch.float64


@pytest.mark.parametrize("token", [-1, -100, 50])
def test_embedding_refuses_ids_that_it_does_not_have(token: int) -> None:
    with pytest.raises(IndexError):
        IrqEmbedding(BlockSpec("nf4", 32), 50, 64)(torch.tensor([[3, token]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_is_that_of_the_decoded_weights(
    tmp_path: Path, tied: bool, embedding: bool, dtype: torch.dtype
) -> None:
    write_tiny_checkpoint(tmp_path / "c", tied=tied, embedding=embedding)
    model = load_model(tmp_path / "c", dtype=dtype)
    with torch.no_grad():
        expected = plain_twin(tmp_path / "c", dtype)(TOKENS).logits
        got = model(TOKENS).logits
        assert got.dtype == dtype
        assert torch.equal(got, expected)
        assert torch.equal(model.dequantize()(TOKENS).logits, expected)
    assert not any(isinstance(module, BlockModule) for module in model.modules())


def test_biases_are_loaded(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    model = load_model(tmp_path / "c")
    assert model.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain_twin(tmp_path / "c", torch.float32)(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_after_the_import(tmp_path: Path, tied: bool) -> None:
    written = write_tiny_checkpoint(tmp_path / "c", tied=tied, embedding=True, shard_bytes=40_000)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "c", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    modules = {name: module for name, module in model.named_modules() if isinstance(module, BlockModule)}
    assert modules.keys() == written.keys()
    for name, tensor in written.items():
        for part, array in modules[name].block_tensor().parts.items():
            assert array.tobytes() == tensor.parts[part].tobytes()
    model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.tie_weights()  # must not break what is not there to tie
    assert model.double()(TOKENS).logits.dtype == torch.float64


def test_load_model_needs_no_import_of_the_quantizer(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", num_hidden_layers=1)
    program = "import sys, irq_export; print(type(irq_export.load_model(sys.argv[1])).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c")], capture_output=True, text=True, check=True
    )
    assert run.stdout == "LlamaForCausalLM\n"


def test_the_configuration_survives(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c")
    config = json.loads(load_model(tmp_path / "c").config.to_json_string())
    assert config["quantization_config"] == open_checkpoint(tmp_path / "c").config["quantization_config"]


def test_an_adapter_trains_on_top(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c", embedding=True, tied=True)
    model = load_model(tmp_path / "c")
    assert len(attach(model, random_adapter(model))) == 14
    model(TOKENS).logits.square().mean().backward()
    first = model.model.layers[0].self_attn.q_proj
    assert first.lora_a.grad.abs().max() > 0
    assert isinstance(first.base, IrqLinear)


def test_only_the_causal_language_model_is_opened(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c")
    with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "c")


def test_load_model_checks_first(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c")
    with (tmp_path / "c" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(MalformedFile):
        load_model(tmp_path / "c")


def test_save_pretrained_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="not serializable"):
        load_model(tmp_path / "c").save_pretrained(tmp_path / "d")
