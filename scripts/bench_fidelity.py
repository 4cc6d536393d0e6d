"""What deployment costs: KL and perplexity of an export next to the peers' ways, as a page of Markdown.

    python scripts/bench_fidelity.py ../smollm2/hf ../shared/data/wikitext2/wiki.test.raw \\
        --work ../fidelity --name SmolLM2-135M-Instruct

The trained model is MODEL_DIR quantised to nf4 with a random non-zero IEC-LoRA on every linear layer
(3 % of each weight's norm). Rows: the unquantised model; the trained model; our files in the reference
runtime and in unmodified llama.cpp; and what other tools do with the same adapter. Rows and exports are kept
in --work, which serves one model and one text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from _stamp import stamp
from gguf import GGMLQuantizationType as Ggml
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

import irq_export
from irq_export.iec import random_adapter
from irq_export.parity.llamacpp import LlamaCpp
from irq_export.parity.metrics import compare
from irq_export.parity.runtimes import ReferenceRuntime, TorchRuntime
from irq_export.parity.target import open_target
from irq_formats.adapter import Adapter, delta_weight
from irq_formats.checkpoint import open_checkpoint
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter

Logits = Callable[[list[int]], np.ndarray]


def windows_of(model_dir: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """The first windows of a text, without special tokens."""
    ids = AutoTokenizer.from_pretrained(model_dir)(text.read_text(), add_special_tokens=False)["input_ids"]
    return [ids[i * length : (i + 1) * length] for i in range(count)]


class Plain:
    """A transformers model whose linear weights can be replaced."""

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def logits(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].numpy()

    def set_weights(self, weight_of: Callable[[str], np.ndarray], names: list[str]) -> None:
        with torch.no_grad():
            for name in names:
                self.model.get_submodule(name).weight.copy_(torch.from_numpy(weight_of(name)))


def requantised(weight: np.ndarray, kind: Ggml | None) -> np.ndarray:
    """The peers' last step: round the merged weight to a ggml type (None: keep fp16)."""
    if kind is None:
        return weight.astype(np.float16).astype(np.float32)
    return dequantize(quantize(weight.astype(np.float16).astype(np.float32), kind), kind)


@contextmanager
def llama(pair: Path, length: int) -> Iterator[Logits]:
    target = open_target(pair)
    with LlamaCpp(target.model, target.adapter, threads=2, ctx=length + 1) as server:  # it keeps one free
        yield server.logprobs


def prepare(model_dir: Path, work: Path) -> tuple[Path, Path]:
    """Quantise and adapt once; return checkpoint and adapter directories."""
    checkpoint, adapter_dir = work / "nf4", work / "adapter"
    if not checkpoint.exists():
        irq_export.quantize(model_dir, checkpoint, codebook="nf4", icq=True)
    if not adapter_dir.exists():
        model = irq_export.load_model(checkpoint)
        adapter = random_adapter(model, rank=32, seed=0, base_hash=open_checkpoint(checkpoint).base_hash)
        write_peft_adapter(adapter_dir, adapter, base_model_name=str(checkpoint))
    return checkpoint, adapter_dir


@click.command(help=__doc__)
@click.argument("model_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("text", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Checkpoints, exports and results."
)
@click.option("--windows", default=8, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a window.")
@click.option("--llama-windows", default=2, show_default=True, help="Of them in llama.cpp (0.2 s a token).")
@click.option("--name", required=True, help="Of the model, for the page.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="WORK/fidelity.md by default.")
def main(
    model_dir: Path, text: Path, work: Path, windows: int, length: int, llama_windows: int, name: str,
    output: Path | None,
) -> None:  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    results_path = work / "fidelity.json"
    setting = {"model": stamp(model_dir), "text": stamp(text), "windows": [windows, llama_windows, length]}
    kept = json.loads(results_path.read_text()) if results_path.exists() else {"setting": setting, "rows": {}}
    if kept["setting"] != setting:
        raise click.UsageError(f"{results_path} is of another model, text or number of windows")
    results_path.write_text(json.dumps(kept, indent=1))
    results = kept["rows"]
    texts = windows_of(model_dir, text, windows, length)
    checkpoint, adapter_dir = prepare(model_dir, work)
    adapter: Adapter = read_peft_adapter(adapter_dir)
    trained = TorchRuntime(checkpoint, adapter, "float32")
    teacher = [trained.logits(tokens) for tokens in texts]

    def row(key: str, bits: str, logits: Logits, count: int = windows) -> None:
        if key in results:
            return
        found = [
            compare(t, logits(w), np.array(w)) for t, w in zip(teacher[:count], texts[:count], strict=True)
        ]
        kl = np.array([m.kl_mean for m in found])
        results[key] = {
            "bits": bits,
            "windows": count,
            "nmse": float(np.mean([m.nmse for m in found])),
            "kl": float(kl.mean()),
            "kl_sem": float(kl.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
            "top1": float(np.mean([m.top1 for m in found])),
            "perplexity": float(np.exp(np.mean([np.log(m.perplexity) for m in found]))),
            "perplexity_trained": float(np.exp(np.mean([np.log(m.perplexity_reference) for m in found]))),
        }
        results_path.write_text(json.dumps(kept, indent=1))
        click.echo(f"{key}: {results[key]}")

    blocks = open_checkpoint(checkpoint)
    names = list(blocks.blocks)
    ours = work / "model.gguf"
    if not ours.exists():
        irq_export.to_gguf(checkpoint, ours, adapter_dir=adapter_dir)
    pair = work / "stock"
    if not pair.exists():
        irq_export.to_gguf(checkpoint, pair, profile="stock", adapter_dir=adapter_dir)

    row("trained model itself (torch)", "4.25 + adapter", trained.logits)
    reference = ReferenceRuntime(ours, None, 1.0, "float32")
    row("**irq GGUF**, reference runtime", "4.25 + adapter", reference.logits)
    with llama(pair, length) as logits:
        row("**stock pair** (Q8_0 table + adapter), llama.cpp", "8.5 + adapter", logits, llama_windows)

    plain = Plain(model_dir)
    row("unquantised model, no adapter", "32", plain.logits)
    original = {name: plain.model.get_submodule(name).weight.detach().numpy().copy() for name in names}

    def delta(name: str) -> np.ndarray:
        return delta_weight(adapter.layers[name])

    kinds = {"fp16": None, "Q8_0": Ggml.Q8_0, "Q5_1": Ggml.Q5_1, "Q4_1": Ggml.Q4_1, "Q4_0": Ggml.Q4_0}
    bits = {"fp16": "16", "Q8_0": "8.5", "Q5_1": "6.0", "Q4_1": "5.0", "Q4_0": "4.5"}
    for kind, ggml in kinds.items():
        plain.set_weights(lambda n, g=ggml: requantised(original[n] + delta(n), g).astype(np.float32), names)
        row(f"merged into the 16-bit base, {kind}", bits[kind], plain.logits)
    for kind, ggml in kinds.items():
        plain.set_weights(
            lambda n, g=ggml: requantised(blocks.block_tensor(n).dequantize() + delta(n), g).astype(
                np.float32
            ),
            names,
        )
        row(f"dequantised, merged, {kind}", bits[kind], plain.logits)
    without_beta = {name: replace(layer, beta1=0.0, beta2=0.0) for name, layer in adapter.layers.items()}
    plain.set_weights(
        lambda n: (blocks.block_tensor(n).dequantize() + delta_weight(without_beta[n])).astype(np.float32),
        names,
    )
    row("stock PEFT on the same base: beta silently zero", "4.25 + adapter", plain.logits)
    output = output or work / "fidelity.md"
    output.write_text(markdown(results, name, text.name, length))
    click.echo(str(output))


def markdown(results: dict[str, dict[str, float]], name: str, text: str, length: int) -> str:
    head = (
        "# Fidelity: what deployment costs\n\n"
        f"Made by `scripts/bench_fidelity.py MODEL_DIR {text} --work DIR --name {name}`.\n"
        "MODEL_DIR quantised to nf4 (ICQ, refit), random IEC-LoRA of rank 32, 3 % of each weight's norm,\n"
        "on every linear. KL(trained || deployed) in nats a token with the standard error over windows,\n"
        f"the first ones of {length} tokens of {text}; perplexity of the same windows, in brackets that\n"
        "of the trained model on them. All in float32 on a CPU, but for llama.cpp, whose kernels round\n"
        "activations to 8 bits.\n\n"
        "KL says how far a deployment is from what was trained, not how good it is: the adapter is random,\n"
        "so the 16-bit base keeps the better perplexity. A trained adapter has learned to make up for its\n"
        "own base, and deploying it on another loses that.\n\n"
        "| deployed as | bits a weight | NMSE of log-probabilities | KL | same top token | perplexity"
        " | windows |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {key} | {r['bits']} | {r['nmse']:.2e} | {r['kl']:.2e} ± {r['kl_sem']:.0e} | {r['top1']:.1%} "
        f"| {r['perplexity']:.3f} ({r['perplexity_trained']:.3f}) | {r['windows']} |\n"
        for key, r in results.items()
    )


if __name__ == "__main__":
    main()
