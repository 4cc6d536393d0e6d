"""A model of more than 2 GiB: what protobuf cannot hold must pass by it, and never lie in memory whole."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import TINY_CONFIG
from tiny_onnx import OnnxRunner

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.checkpoint import hf_tensor_shapes
from irq_formats.checkpoint_writer import checkpoint_writer
from irq_formats.model import ModelConfig
from irq_formats.names import linear_names
from irq_formats.onnx.model_file import open_model
from irq_formats.safetensors_io import TensorSpec

_CONFIG = {
    **TINY_CONFIG,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 10,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
#: Exports in a process of its own and prints the bytes written and the peak of its memory, KiB (of ru_maxrss
#: Linux says what the parent had, if that was more).
_EXPORT = """
import json, sys
from pathlib import Path
from irq_export.export.onnx import to_onnx
files = to_onnx(sys.argv[1], sys.argv[2]).files
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(json.dumps([files["model.onnx.data"], int(peak)]))
"""


def write_large_checkpoint(path: Path) -> None:
    """Random codes and floats: quick to make, and nothing in it is zero."""
    model, spec = ModelConfig.from_hf(_CONFIG), BlockSpec("int4")
    linears, rng = set(linear_names(model)), np.random.default_rng(0)
    with checkpoint_writer(path) as writer:
        for name, shape in hf_tensor_shapes(model).items():
            module = name.removesuffix(".weight")
            if module in linears:
                parts = {
                    part: rng.integers(0, 256, size, dtype=np.uint8)
                    if part == "codes"
                    else np.full(size, 130, np.uint8)
                    if dtype == np.uint8
                    else np.full(size, 0.02, np.float32)
                    for part, (dtype, size) in part_layout(spec, (shape[0], shape[1])).items()
                }
                writer.add_block(module, BlockTensor(spec, (shape[0], shape[1]), parts))
                continue
            bits = rng.integers(0x3C00, 0x3E00, shape, dtype=np.uint16)  # bfloat16, 0.008 to 0.125
            writer.add_plain(TensorSpec(name, "BF16", shape), partial(np.copy, bits))
        writer.finish(_CONFIG, spec=spec, skipped={}, search={"icq": False})


@pytest.mark.slow  # two minutes, 4 GB of disk
def test_more_than_two_gibibytes(tmp_path):
    write_large_checkpoint(tmp_path / "c")
    command = [sys.executable, "-c", _EXPORT, str(tmp_path / "c"), str(tmp_path / "o")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    data_bytes, peak_kib = json.loads(done.stdout)
    assert data_bytes > 2**31
    largest = max(tensor.nbytes for tensor in open_model(tmp_path / "o").tensors.values())
    assert peak_kib * 1024 <= largest + 2**30
    logits = OnnxRunner(tmp_path / "o").logits(np.arange(8)[None])
    assert logits.shape == (1, 8, 128256)
    assert np.isfinite(logits).all()
