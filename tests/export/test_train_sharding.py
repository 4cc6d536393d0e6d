"""FSDP2 and mixed-precision policies on a quantised base: its bits stay, or somebody is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_checkpoints import write_tiny_checkpoint
from tolerance import DDP_GRADIENT
from torch import distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel.distributed import _cast_buffers, _MixedPrecision

from irq_export.block_modules import BlockModule, IrqLinear
from irq_export.peft_iec import IrqLoraConfig
from irq_export.quantizer import load_model
from irq_export.train.config import TrainConfig
from irq_export.train.sharding import check_sharding, make_shardable
from irq_formats.blocks import BlockSpec
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import UsageError

TOKENS = torch.arange(24).reshape(1, 24) * 7 % 259


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one, over gloo."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def adapted(base: Path) -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(load_model(base), IrqLoraConfig(r=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_beta" in name:
                parameter.normal_(std=0.05)
    return model.train()


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model(TOKENS, labels=TOKENS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


@pytest.mark.parametrize(
    "spec", [BlockSpec(), BlockSpec("int3", scale="f16", tau="f16")], ids=["nf4 dq8", "int3 f16"]
)
@pytest.mark.parametrize("policy", [None, torch.bfloat16])
def test_a_sharded_base_keeps_its_bits(
    policy: torch.dtype | None, spec: BlockSpec, one_process: None, tmp_path: Path
) -> None:
    """A step under FSDP2, also with a policy that casts parameters; gradients without one are the usual."""
    write_tiny_checkpoint(tmp_path / "base", spec, tied=True, embedding=True)
    expected = gradients(adapted(tmp_path / "base"))
    model = adapted(tmp_path / "base")
    make_shardable(model)
    cast = MixedPrecisionPolicy(param_dtype=policy)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=cast)
    fully_shard(model, mp_policy=cast)
    linear = model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()
    assert isinstance(linear, IrqLinear)
    assert isinstance(linear.codes, DTensor)
    found = gradients(model)
    assert found.keys() == expected.keys()
    if policy is None:
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= DDP_GRADIENT * gradient.abs().max()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    checkpoint = open_checkpoint(tmp_path / "base")
    blocks = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    compared = 0
    for name, block in blocks.items():
        if isinstance(block, BlockModule):
            stored = checkpoint.block_tensor(name.replace(".base_layer", ""))
            parts = block.block_tensor().parts
            assert all(parts[part].tobytes() == array.tobytes() for part, array in stored.parts.items())
            compared += 1
    assert compared == len(checkpoint.blocks) == 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_policy_that_casts_buffers_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """What DDP's and FSDP1's ``buffer_dtype`` do to a model: nothing is computed from lost bits."""
    write_tiny_checkpoint(tmp_path / "base", tied=True, embedding=True)
    model = adapted(tmp_path / "base")
    _cast_buffers(_MixedPrecision(buffer_dtype=dtype), model)
    with pytest.raises(UsageError, match="was cast, and its bits are lost"):
        model(TOKENS)


def test_casts_of_a_shardable_model_leave_the_base_alone(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "base", tied=True, embedding=True)
    model = adapted(tmp_path / "base")
    before = {n: m.block_tensor() for n, m in model.named_modules() if isinstance(m, IrqLinear)}
    make_shardable(model)
    model.half().to(torch.bfloat16)
    for name, tensor in before.items():
        parts = model.get_submodule(name).block_tensor().parts
        assert all(parts[part].tobytes() == array.tobytes() for part, array in tensor.parts.items())


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="several processes"):
        check_sharding(TrainConfig(fsdp=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_sharding(TrainConfig(fsdp=True))
    with pytest.raises(UsageError, match="torch's optimizer"):
        check_sharding(TrainConfig(fsdp=True, optimizer="paged_adamw_32bit"))
