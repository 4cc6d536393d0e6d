"""The two trainings of the reproduction: the base on whole, then all arms side by side on top of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _reproduce_data import Sequences, batches
from _reproduce_model import KINDS, MODULES, Adapters, Arms, Shape, Weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from irq_formats.gguf import open_gguf
from irq_formats.names import gguf_to_hf

__all__ = ["Recipe", "arm_weights", "read_base", "step_times", "train_arms", "train_base", "write_base"]


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning as IR-QLoRA's released script does it, but for what the options change.

    Attributes:
        steps: Optimiser steps.
        batch: Examples a step.
        rank: Of the adapters.
        scaling: alpha / r.
        rate: Learning rate, constant.
        max_norm: Of the gradient of an arm.
    """

    steps: int
    batch: int = 16
    rank: int = 64
    scaling: float = 0.25
    rate: float = 2e-4
    max_norm: float = 0.3


def read_base(path: Path, config: Path, device: str) -> tuple[Shape, dict[str, Tensor]]:
    """Read a model, float32, on a device: an HF directory's safetensors, a GGUF, or a file of `write_base`.

    Returns:
        Its shape; ``embedding``, ``norms`` (2 * layers + 1, hidden), each kind of linear (layers, out, in).
    """
    shape = Shape.from_config(json.loads(config.read_text("utf-8")))
    if path.suffix == ".gguf":
        file = open_gguf(path)
        state = {gguf_to_hf(name): torch.from_numpy(file.read_f32(name)) for name in file.tensors}
        for layer in range(shape.layers):
            for kind, heads in (("q", shape.heads), ("k", shape.kv_heads)):
                name = f"model.layers.{layer}.{MODULES[kind]}.weight"
                pairs = state[name].view(heads, shape.head_dim // 2, 2, -1)  # llama.cpp's row order
                state[name] = pairs.transpose(1, 2).reshape(state[name].shape)
    else:
        state = load_file(path / "model.safetensors" if path.is_dir() else path)
    if "embedding" in state:
        return shape, {name: tensor.to(device) for name, tensor in state.items()}
    layers = [f"model.layers.{layer}." for layer in range(shape.layers)]
    norms = [
        state[p + n] for p in layers for n in ("input_layernorm.weight", "post_attention_layernorm.weight")
    ]
    base = {
        "embedding": state["model.embed_tokens.weight"],
        "norms": torch.stack([*norms, state["model.norm.weight"]]),
    }
    base |= {kind: torch.stack([state[f"{p}{MODULES[kind]}.weight"] for p in layers]) for kind in KINDS}
    return shape, {name: tensor.float().to(device) for name, tensor in base.items()}


def write_base(path: Path, base: dict[str, Tensor]) -> None:
    """Write a base, float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in base.items()}, path)


def arm_weights(base: dict[str, Tensor], linears: Sequence[dict[str, Tensor]], dtype: torch.dtype) -> Weights:
    """Weights of arms: own linears, (layers, out, in) of each kind; embedding and norms of the base."""
    stacked = {kind: torch.stack([arm[kind].to(dtype) for arm in linears], dim=1) for kind in KINDS}
    return Weights(base["embedding"].to(dtype), base["norms"].to(dtype), stacked)


def train_base(
    shape: Shape,
    base: dict[str, Tensor],
    books: Sequences,
    *,
    batch: int,
    passes: int,
    most: int | None,
    rate: float,
    seconds: float,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Train all weights on windows of text, bf16 products of float32 weights, cosine to zero.

    Args:
        shape: Of the model.
        base: Of :func:`read_base`.
        books: Windows of one length.
        batch: Windows a step.
        passes: Times every window is read.
        most: Bound on the steps, if any.
        rate: Peak learning rate.
        seconds: Bound on the time: the schedule is shortened to fit, from the speed of the first steps.

    Returns:
        The trained weights, and what the run was.
    """
    device = base["embedding"].device
    params = {name: tensor.clone().requires_grad_() for name, tensor in base.items()}
    optimizer = torch.optim.AdamW(
        params.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    windows = torch.from_numpy(books.ids.reshape(len(books), -1).astype(np.int64)).to(device)
    order = torch.cat(
        [torch.from_numpy(np.random.default_rng(i).permutation(len(books))) for i in range(passes)]
    )
    steps, warmup = min(len(order) // batch, most or len(order)), 20
    at = torch.arange(batch * windows.shape[1], device=device).view(batch, -1)[:, :-1].reshape(1, -1)
    losses: list[Tensor] = []
    start = time.perf_counter()
    step = 0
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        tokens = windows[order[step * batch : (step + 1) * batch].to(device)]
        cast = {name: tensor.to(torch.bfloat16) for name, tensor in params.items()}
        weights = Weights(cast["embedding"], cast["norms"], {kind: cast[kind][:, None] for kind in KINDS})
        model = Arms(shape, weights, fuse=device.type == "cuda")
        loss = model.losses(tokens[None], at, tokens[:, 1:].reshape(1, -1)).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step == warmup:
            losses[-1].item()
            begun = time.perf_counter()
        if step == 2 * warmup:
            losses[-1].item()
            a_step = (time.perf_counter() - begun) / warmup
            steps = min(steps, step + int((seconds - (time.perf_counter() - start)) / a_step))
    curve = torch.stack(losses).cpu().numpy()
    facts = {
        "steps": steps,
        "tokens": steps * batch * windows.shape[1],
        "rate": rate,
        "seconds": round(time.perf_counter() - start, 1),
        "loss_first": round(float(curve[:20].mean()), 4),
        "loss_last": round(float(curve[-20:].mean()), 4),
    }
    return {name: tensor.detach() for name, tensor in params.items()}, facts


def train_arms(
    model: Arms, examples: Sequences, seeds: Sequence[int], recipe: Recipe, deadline: float
) -> dict[str, np.ndarray] | None:
    """Train the adapters of all arms.

    Args:
        model: With adapters.
        examples: To train on.
        seeds: Of each arm: the order of its data.
        recipe: How.
        deadline: Give up when ``time.monotonic()`` passes it.

    Returns:
        ``losses`` (steps, arms), nats; ``seconds`` (1,), without the first ten steps; None when given up.
    """
    adapters = model.adapters
    assert adapters is not None  # noqa: S101
    device = model.weights.embedding.device
    optimizer = torch.optim.AdamW(
        adapters.parameters(), lr=recipe.rate, weight_decay=0.0, fused=device.type == "cuda"
    )
    names = sorted(set(seeds))
    of_arm = torch.tensor([names.index(seed) for seed in seeds] if len(names) > 1 else [0])
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step, batch in enumerate(batches(examples, names, recipe.steps, recipe.batch)):
        if step % 10 == 0:
            if losses:
                losses[-1].sum().item()
            if time.monotonic() > deadline:
                return None
            start = time.perf_counter() if step == 10 else start
        tensors = [torch.from_numpy(array)[of_arm].to(device, non_blocking=True) for array in batch]
        loss = model.losses(*tensors)
        loss.sum().backward()
        adapters.clip(recipe.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    curve = torch.stack(losses).cpu().numpy()
    return {"losses": curve, "seconds": np.array([time.perf_counter() - start])}


def step_times(shape: Shape, recipe: Recipe, length: int, device: str) -> list[dict[str, object]]:
    """Time a fine-tuning step on random weights: arms side by side, with and without IEC.

    Returns:
        A row for each setting: arms, iec, fuse, milliseconds of a step and of an arm, peak memory in GiB.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    base = {"embedding": torch.randn((shape.vocab, shape.hidden), device=device) * 0.02}
    base["norms"] = torch.ones((2 * shape.layers + 1, shape.hidden), device=device)
    linears = {k: torch.randn((shape.layers, *shape.linear(k)), device=device) * 0.02 for k in KINDS}
    rows: list[dict[str, object]] = []
    for arms, iec, fuse in (
        (1, False, True),
        (1, True, True),
        (8, True, True),
        (16, False, True),
        (16, True, True),
    ):
        if not device.startswith("cuda"):
            fuse = False
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        adapters = Adapters(
            shape,
            [0] * arms,
            [iec] * arms,
            [iec] * arms,
            rank=recipe.rank,
            scaling=recipe.scaling,
            device=device,
        )
        model = Arms(shape, arm_weights(base, [linears] * arms, dtype), adapters, fuse=fuse)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, fused=device.startswith("cuda"))
        tokens = torch.randint(shape.vocab, (1, recipe.batch, length), device=device)
        at = torch.arange(0, recipe.batch * length, 2, device=device)[None]
        times = []
        for _ in range(recipe.steps):
            start = time.perf_counter()
            loss = model.losses(tokens, at, tokens.view(1, -1)[:, at[0]])
            loss.sum().backward()
            adapters.clip(recipe.max_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.sum().item()
            times.append(1000 * (time.perf_counter() - start))
        step = float(np.median(times[len(times) // 2 :]))
        row = {
            "arms": arms,
            "iec": iec,
            "fuse": fuse,
            "length": length,
            "step_ms": step,
            "arm_ms": step / arms,
        }
        row["first_ms"] = times[0]
        if device.startswith("cuda"):
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        rows.append(row)
        del model, adapters, optimizer
    return rows
