"""The whole spine on a real model: SmolLM2-135M-Instruct. Slow: minutes, and a 100 MB package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import irq_export
from irq_export.iec import random_adapter
from irq_export.parity.gates import FAST_NMSE
from irq_export.parity.report import ParityReport
from irq_formats.checkpoint import open_checkpoint
from irq_formats.peft_adapter import write_peft_adapter
from tests.tolerance import NMSE_FLOAT32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # a 135 M model in float64, four times


@pytest.fixture(scope="module")
def model_dir(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory, from IRQ_SMOLLM2 or made by scripts/get_smollm2.py."""
    if "IRQ_SMOLLM2" in os.environ:
        return Path(os.environ["IRQ_SMOLLM2"])
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    script = repo / "scripts" / "get_smollm2.py"
    subprocess.run([sys.executable, script, "-o", out], check=True)
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


@pytest.mark.parametrize(("codebook", "profile"), [("nf4", "irq"), ("int4", "stock")])
def test_native_in_both_modes(
    codebook: str, profile: str, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    """The engine that run and serve use, on our file and on a stock pair, where tau rides in the adapter."""
    checkpoint, adapter_dir, _ = adapted(model_dir, tmp_path, codebook)
    out = tmp_path / ("model.gguf" if profile == "irq" else "pair")
    irq_export.to_gguf(checkpoint, out, profile=profile, adapter_dir=adapter_dir)
    arguments = {"against": checkpoint, "adapter": adapter_dir, "text": text, "runtimes": ["native"]}
    report = irq_export.verify(out, positions=256, greedy=64, **arguments)
    assert report.passed, report.to_text()
    assert value(report, "logits", "native exact", "nmse") <= NMSE_FLOAT32
    assert value(report, "logits", "native fast", "nmse") <= FAST_NMSE
    greedy = {check.name.split(" against")[0]: check for check in report.checks if check.level == "greedy"}
    assert greedy.keys() == {"native exact", "native fast"}
    assert greedy["native exact"].values["tokens"] == greedy["native exact"].values["expected"]
    assert all(len(check.values["tokens"]) == 64 for check in greedy.values())
    broken = irq_export.verify(out, positions=64, greedy=0, adapter_scale=0.0, **arguments)
    assert not broken.passed


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
