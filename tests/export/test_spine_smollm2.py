"""The whole spine on a real model: SmolLM2-135M-Instruct. Slow: minutes, and a 100 MB package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import irq_export
from irq_export.iec import random_adapter
from irq_export.parity.report import ParityReport
from irq_formats.checkpoint import open_checkpoint
from irq_formats.peft_adapter import write_peft_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # a 135 M model in float64, four times


@pytest.fixture(scope="module")
def model_dir(shared_data: Path, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory, from IRQ_SMOLLM2 or made by scripts/get_smollm2.py."""
    if "IRQ_SMOLLM2" in os.environ:
        return Path(os.environ["IRQ_SMOLLM2"])
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    tokenizer = shared_data / "models" / "smollm2-135m-instruct"
    script = repo / "scripts" / "get_smollm2.py"
    subprocess.run([sys.executable, script, "-o", out, "--tokenizer", tokenizer], check=True)
    return out


@pytest.fixture(scope="module")
def text(shared_data: Path) -> Path:
    return shared_data / "wikitext2" / "wiki.test.joined.txt"


def adapted(model_dir: Path, work: Path, codebook: str) -> tuple[Path, Path, float]:
    """Quantise and put a random IEC adapter on: checkpoint, adapter, bits per weight."""
    checkpoint, adapter_dir = work / codebook, work / f"{codebook}-adapter"
    report = irq_export.quantize(model_dir, checkpoint, codebook=codebook)
    adapter = random_adapter(
        irq_export.load_model(checkpoint), rank=32, seed=0, base_hash=open_checkpoint(checkpoint).base_hash
    )
    write_peft_adapter(adapter_dir, adapter, base_model_name=str(checkpoint))
    return checkpoint, adapter_dir, report.bits_per_weight()


def value(report: ParityReport, level: str, name: str, key: str) -> float:
    [check] = [check for check in report.checks if check.level == level and name in check.name]
    return float(check.values[key])


def test_nf4_in_our_gguf(model_dir: Path, text: Path, tmp_path: Path) -> None:
    checkpoint, adapter_dir, bits = adapted(model_dir, tmp_path, "nf4")
    assert bits <= 4.26
    file = tmp_path / "model.gguf"
    irq_export.to_gguf(checkpoint, file, adapter_dir=adapter_dir)
    report = irq_export.verify(
        file, against=checkpoint, adapter=adapter_dir, runtimes=["reference"], text=text, positions=256
    )
    assert report.passed, report.to_text()
    assert value(report, "logits", "reference float64", "nmse") <= 1e-12
    [greedy] = [check for check in report.checks if check.level == "greedy"]
    assert greedy.passed
    assert len(greedy.values["tokens"]) == 64


def test_int4_in_stock_llama_cpp(model_dir: Path, text: Path, tmp_path: Path) -> None:
    checkpoint, adapter_dir, _ = adapted(model_dir, tmp_path, "int4")
    pair = tmp_path / "stock"
    irq_export.to_gguf(checkpoint, pair, profile="stock", adapter_dir=adapter_dir)
    arguments = {"against": checkpoint, "adapter": adapter_dir, "text": text, "runtimes": ["llama.cpp"]}
    report = irq_export.verify(pair, **arguments)
    assert report.passed, report.to_text()
    broken = irq_export.verify(pair, adapter_scale=0.0, positions=64, greedy=0, **arguments)
    assert not broken.passed  # tau and LoRA are really in the adapter


@pytest.mark.parametrize("codebook", ["nf4", "int4", "nf3", "nf2"])
def test_onnx_in_every_runtime(codebook: str, model_dir: Path, tmp_path: Path) -> None:
    """onnxruntime and genai, with our library and without; memory of loading is decided on at this size."""
    pytest.importorskip("onnxruntime_genai")
    from irq_export.export.onnx import to_onnx

    checkpoint, adapter_dir, _ = adapted(model_dir, tmp_path, codebook)
    to_onnx(checkpoint, tmp_path / "onnx", adapters=[adapter_dir])
    report = irq_export.verify(
        tmp_path / "onnx", against=checkpoint, adapter=adapter_dir, positions=128, greedy=32, threads=1
    )
    assert report.passed, report.to_text()
    assert all(check.passed for check in report.checks if check.level in ("memory", "kernels", "greedy"))
    assert sum(check.level == "greedy" for check in report.checks) == 4 * 2
