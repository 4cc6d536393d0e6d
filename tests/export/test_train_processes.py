"""``irq-export train`` in two processes over gloo computes what one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import held_out_curve, loss_curve, save_tiny_training
from tolerance import DDP_GRADIENT

from irq_formats.peft_adapter import read_peft_adapter

_FIRST_STEP = """
import sys, torch
from transformers import TrainerCallback
from irq_export.train.config import make_config
from irq_export.train.run import train

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # every process takes part
            named = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
            named["sharded"] = torch.tensor(sum(hasattr(p, "full_tensor") for p in model.parameters()))
            if state.is_world_process_zero:
                torch.save(named, sys.argv[1])

settings = dict(model=sys.argv[2], data=(sys.argv[3],), output=sys.argv[4], rank=4, batch_size=4, epochs=1.0,
                max_length=96, prompt="plain", device="cpu", max_grad_norm=1e9, log_every=1,
                eval_data=(sys.argv[3],), eval_every=5, fsdp="fsdp" in sys.argv[5:])
train(make_config(settings), callbacks=[Keep()])
"""


@pytest.mark.slow  # three interpreters that import torch and transformers: 30 s on one core, each
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(how: str, tmp_path: Path) -> None:
    """Over gloo: the first step's gradients, weighted by tokens over both halves, are those of one.

    So are all losses of an epoch whose last batch is short, and the held-out loss. FSDP2 is proved to have
    sharded, and both save the whole adapter of one process.
    """
    save_tiny_training(tmp_path)
    script = tmp_path / "first_step.py"
    script.write_text(_FIRST_STEP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(name: str, rank: int, world: int) -> subprocess.Popen[bytes]:
        hidden = {"CUDA_VISIBLE_DEVICES": ""}  # accelerate would shard on a GPU if there is one
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
        environment = {**os.environ, **hidden, **(variables if world > 1 else {})}
        paths = [tmp_path / f"{name}.pt", tmp_path / "model", tmp_path / "data.json", tmp_path / name]
        more = [how] if world > 1 else []
        return subprocess.Popen([sys.executable, str(script), *map(str, paths), *more], env=environment)

    for name, world in (("one", 1), ("two", 2)):
        processes = [start(name, rank, world) for rank in range(world)]
        assert [process.wait(timeout=200) for process in processes] == [0] * world
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    two = {name.removeprefix("module."): gradient for name, gradient in two.items()}
    sharded = [int(found.pop("sharded")) for found in (one, two)]
    assert sharded[0] == 0
    assert (sharded[1] > 14 * 6) == (how == "fsdp")  # the parts of 14 linear layers, and the adapter
    assert one.keys() == two.keys()
    assert any("lora_beta" in name for name in one)
    for name, gradient in one.items():
        largest = gradient.abs().max()
        assert largest > 0 or "lora_A" in name or "lora_beta1" in name  # B is zero: nothing reaches A yet
        assert (two[name] - gradient).abs().max() <= DDP_GRADIENT * max(float(largest), 1e-6)
    found = [loss_curve(tmp_path / name) for name in ("one", "two")]
    assert [step for step, *_ in found[0]] == [1, 2, 3, 4, 5]  # 19 rows: three are left for the last step
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    evaluated = [held_out_curve(tmp_path / name) for name in ("one", "two")]
    assert [step for step, _ in evaluated[0]] == [5]
    assert evaluated[1][0] == pytest.approx(evaluated[0][0], rel=1e-4)
    ours, theirs = (read_peft_adapter(tmp_path / name / "adapter").layers for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        np.testing.assert_allclose(ours[name].lora_a, layer.lora_a, rtol=0, atol=2e-3)  # five steps of 2e-4
        assert ours[name].lora_b.shape == layer.lora_b.shape
        assert np.abs(ours[name].lora_b).max() > 0
