"""What the machine, the model or the user does not grant the engine: an error that says so."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_files import block_tensors, model_config, source, state_f32, write_irq, write_stock
from tiny_models import tiny_model

from irq_formats.blocks import BlockSpec
from irq_formats.errors import MalformedFile, UsageError
from irq_formats.gguf import STR, GgmlType, TensorSource, write_gguf
from irq_formats.gguf.model_keys import model_metadata
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model
from irq_runtime.sampling import SamplingParams, sample

LIMITED = """
import resource, sys
from pathlib import Path
from irq_formats.errors import IrqError
from irq_runtime.engine import Engine
model, threads, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    engine = Engine(model, threads=threads)
    print(engine.logits([1, 2, 3]).shape)
except IrqError as error:
    print(error.code, error)
"""


def run_limited(model: Path, *, threads: int, memory: int, **environment: str) -> str:
    """Open a model in a process that may take `memory` more bytes of addresses; return what it says."""
    command = [sys.executable, "-c", LIMITED, str(model), str(threads), str(memory)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, **environment}
    )
    return done.stdout


@pytest.fixture(scope="module")
def irq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in nf4."""
    model = tiny_model()
    path = tmp_path_factory.mktemp("limits") / "m.gguf"
    write_irq(path, model, block_tensors(model, BlockSpec("nf4")))
    return path


def test_threads_the_system_does_not_give(irq_file: Path) -> None:
    """Their stacks do not fit; those that began are ended, not waited for."""
    said = run_limited(irq_file, threads=256, memory=400 << 20)
    assert said.startswith("usage the system gives no more threads; expected 256 threads, got ")
    assert run_limited(irq_file, threads=4, memory=400 << 20) == "(3, 259)\n"


def test_context_is_the_models_at_most(irq_file: Path) -> None:
    """A tiny model has 256 positions."""
    with pytest.raises(UsageError, match="no such context; expected 1 to 256 positions, got 257"):
        Engine(irq_file, context=257)
    for context, hint in (
        (256, "The model has no more positions"),
        (255, "Open the engine with a larger context"),
    ):
        engine = Engine(irq_file, context=context)
        cache = engine.new_cache()
        engine.step([1] * context, cache)
        with pytest.raises(UsageError, match=hint):
            engine.step([1], cache)


@pytest.mark.parametrize("open_model", [Engine, load_model])
@pytest.mark.parametrize("is_stock", [False, True], ids=["irq", "stock"])
def test_a_scale_needs_an_adapter(
    open_model: Callable[..., object], is_stock: bool, irq_file: Path, tmp_path: Path
) -> None:
    """Who gives one believes that there is an adapter."""
    file = irq_file
    if is_stock:
        file = tmp_path / "m.gguf"
        write_stock(file, tiny_model())
    with pytest.raises(UsageError, match=r"no adapter to scale.* got scale 0\.5"):
        open_model(file, None, 0.5)
    open_model(file, None, 1.0)


def test_keys_that_half_a_cache_does_not_hold(tmp_path: Path) -> None:
    """fp16 ends at 65504, and the biases of some models do not."""
    model = tiny_model("qwen2")
    model.model.layers[0].self_attn.k_proj.bias.data.fill_(1e5)
    write_stock(tmp_path / "m.gguf", model)
    params = SamplingParams()
    sample(Engine(tmp_path / "m.gguf").session().next_logits([1, 2, 3]), params, np.random.default_rng(0))
    broken = Engine(tmp_path / "m.gguf", half_cache=True).session().next_logits([1, 2, 3])
    with pytest.raises(MalformedFile, match=r"not numbers.*half_cache"):
        sample(broken, params, np.random.default_rng(0))


@pytest.mark.parametrize("wanted", ["sse9", "neon" if platform.machine() == "x86_64" else "avx2"])
def test_an_instruction_set_that_is_not_here(wanted: str, irq_file: Path) -> None:
    said = run_limited(irq_file, threads=1, memory=1 << 30, IRQ_ISA=wanted)
    assert said.startswith("usage IRQ_ISA: no such instruction set here")
    assert said.endswith(f", got {wanted}\n")


def test_a_wide_model_takes_fewer_rows_at_once(tmp_path: Path) -> None:
    """A file of 28 MB whose 256 rows at once would take 2 GB."""
    model = tiny_model(hidden_size=64, num_hidden_layers=1)
    width = 1 << 19
    shapes = {"ffn_gate": (width, 64), "ffn_up": (width, 64), "ffn_down": (64, width)}
    config = dataclasses.replace(model_config(model), intermediate_size=width)
    sources = []
    for name, array in state_f32(model).items():
        shape = shapes.get(name.removeprefix("blk.0.").removesuffix(".weight"))
        if shape is None:
            sources.append(source(name, array))
            continue
        # Q2_0: a scale and 16 bytes for 64 values
        blocks = np.zeros((shape[0], shape[1] // 64 * 18), np.uint8)
        sources.append(TensorSource(name, shape, GgmlType.Q2_0, lambda blocks=blocks: blocks))
    header = {"general.architecture": STR("llama"), **model_metadata(config, "llama")}
    write_gguf(tmp_path / "wide.gguf", header, sources)
    assert (tmp_path / "wide.gguf").stat().st_size < 30e6
    assert run_limited(tmp_path / "wide.gguf", threads=1, memory=1 << 30) == "(3, 259)\n"
