"""The Triton kernels in Triton's interpreter, on a CPU: their logic, not their compiled code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import math
import torch
from test_icq import awkward_blocks
from tiny_checkpoints import random_block_tensor
from irq_export.block_linear import _decode
from irq_export.block_modules import IrqLinear
from irq_export.icq_search import SearchConfig, search_blocks
from irq_export.elastic import Elastic, elastic_gradients, elastic_weights
from irq_export.kernels import decode, elastic, icq
from irq_formats.blocks import BlockSpec

searches = [SearchConfig(tau_steps=20), SearchConfig(tau_steps=20, tie="first", refine="none"),
            SearchConfig(tau_steps=3, objective="mse")]
for codebook in ("nf4", "nf3", "nf2", "int4", "int3", "int2"):
    for size in (64, 32):
        blocks = torch.from_numpy(awkward_blocks(size)[::3].copy())
        for config in searches:
            found = icq.search(blocks, codebook, config, with_tau=True)
            expected = search_blocks(blocks, codebook, config, with_tau=True)
            assert all(map(torch.equal, found, expected)), (codebook, size, config)
        for storage in (("dq8", "dq8"), ("f16", "none")):
            spec = BlockSpec(codebook, size, *storage)
            module = IrqLinear(spec, 192, 37)
            module.load_block(random_block_tensor(spec, (37, 192)))
            parts = module.parts()
            assert torch.equal(decode.decode(parts, torch.float32), _decode(parts, torch.float32)), spec
make = lambda shape, scaling, dtype: Elastic(
    torch.randn(shape).to(dtype), torch.tensor([0.37]).to(dtype), scaling)
for dtype in (torch.float32, torch.bfloat16):  # as stored; the interpreter's own cast to bf16 cuts off
    for shapes in (((12, 128), (5, 7)), ((64, 8), (2048, 3)), ((6, 6),)):
        matrices = [make(shape, 0.3 + i, dtype) for i, shape in enumerate(shapes)]
        values = [math.gcd(*shape) / shape[1] for shape in shapes]
        found = elastic.elastic_weights(matrices, values, torch.float32)
        assert all(map(torch.equal, found, elastic_weights(matrices, torch.float32))), (shapes, dtype)
        grads, scalings = [torch.randn(shape).to(dtype) for shape in shapes], [m.scaling for m in matrices]
        values = [value * scaling for value, scaling in zip(values, scalings)]
        found = elastic.elastic_gradients(grads, scalings, values, torch.float32)
        for ours, expected, grad in zip(found, elastic_gradients(grads, scalings, torch.float32), grads):
            assert torch.equal(ours[0], expected[0]), (shapes, dtype)
            assert (ours[1] - expected[1]).abs() <= 1e-6 * grad.float().abs().sum(), (shapes, dtype)
"""


@pytest.mark.slow  # minutes: the interpreter runs every operation of every program in Python
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted_kernels_equal_torch(repo: Path) -> None:
    path = os.pathsep.join([*(str(repo / d) for d in ("tests", "tests/export")), *filter(None, sys.path)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
