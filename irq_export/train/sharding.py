"""FSDP2 through transformers' Trainer: base, adapter and optimizer spread over the devices.

The parts of the quantised linear layers become frozen parameters of bytes: every device keeps its share and
gathers a decoder layer when it computes it, forward and backward. Bytes are cast by no policy, and adapters
are gathered in float32 too: the arithmetic is that of one device, autocast included. What stays whole on
every device is a quantised embedding, which a tied head reads at the other end of the model.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainingArguments

from irq_export.block_modules import IrqLinear
from irq_export.train.config import TrainConfig
from irq_formats.errors import UsageError

__all__ = [
    "check_sharding",
    "keep_float32",
    "make_shardable",
    "shard_on_cpu",
    "sharding_arguments",
    "trained_state",
]


def check_sharding(config: TrainConfig) -> None:
    """Refuse what cannot be sharded.

    Raises:
        UsageError: One process alone, or an optimizer that knows no sharded parameters.
    """
    if config.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UsageError(
            "--fsdp needs several processes",
            hint="torchrun --nproc-per-node 2 --no-python irq-export train … --fsdp",
        )
    if config.fsdp and config.optimizer == "paged_adamw_32bit":
        raise UsageError("--fsdp goes with torch's optimizer", expected="--optimizer adamw_torch")


def sharding_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return what transformers' TrainingArguments are told."""
    if not config.fsdp:
        return {}
    return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def make_shardable(model: nn.Module) -> None:
    """Let FSDP2 see the quantised linear layers of a model as parameters."""
    for module in model.modules():
        if isinstance(module, IrqLinear):
            module.shardable()


def shard_on_cpu(arguments: TrainingArguments) -> None:
    """Tell accelerate, which shards on accelerators only, that processes on CPUs may shard too.

    Before the Trainer is made. The product of such a run is exact; it is how sharding is tested.
    """
    if arguments.fsdp and arguments.use_cpu:
        state = Accelerator(cpu=True, mixed_precision="bf16" if arguments.bf16 else "no").state
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)


def trained_state(model: nn.Module) -> dict[str, Any]:
    """Gather the parameters that are trained in the host's memory of the first process; all take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def keep_float32(trainer: Trainer) -> None:
    """Leave casting to autocast, which rounds where it does on one device: betas are gathered as they are."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.mixed_precision_policy = None
