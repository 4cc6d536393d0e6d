"""Speed of quantising on a CPU: the search on every instruction set, and ``quantize`` from disk to disk.

First a 4096x4096 matrix of normal weights, blocks of 64, 201 candidates; then the seven linear layers of one
LLaMA-7B block in bf16, as ``irq-export quantize`` reads and writes them. All rows of a table run in turn, so
that a machine that drifts drifts for all; medians. With as many threads as torch uses:

    OMP_NUM_THREADS=2 python scripts/bench_quantize.py --json result.json
    python scripts/bench_quantize.py --smoke        # tiny shapes: does everything run?
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from irq_export import icq_native
from irq_export.icq import quantize_tensor
from irq_export.icq_search import SearchConfig
from irq_export.quantize_model import quantize
from irq_formats.blocks import BlockSpec, store_scales
from irq_formats.safetensors_io import SafeTensorsWriter, TensorSpec
from irq_runtime import _native

MODEL_BLOCKS = 32  # of a LLaMA-7B
MODEL_WEIGHTS = MODEL_BLOCKS * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; in turn in every round, the first round unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def on(isa: str, run: Callable[[], object]) -> None:
    """Run on one instruction set."""
    before = _native.isa()
    _native.set_isa(isa)
    try:
        run()
    finally:
        _native.set_isa(before)


def bench_matrix(size: int, rounds: int) -> dict[str, float]:
    """Seconds of the parts of quantising a matrix, by instruction set."""
    weight = torch.randn(size, size) * 0.02
    blocks = weight.view(-1, 64)
    pairs = icq_native.search(blocks, "nf4", SearchConfig(), with_tau=True)
    scale, tau = (pair.numpy() for pair in pairs)
    shape = (size, size)

    def search(codebook: str, **settings: object) -> Callable[[], object]:
        config = SearchConfig(**settings)  # type: ignore[arg-type]
        return lambda: icq_native.search(blocks, codebook, config, with_tau=True)

    parts: dict[str, Callable[[], object]] = {
        "search, nf4, first of ties": search("nf4", tie="first", refine="none"),
        "search, nf4, ties by error": search("nf4", refine="none"),
        "search, nf4, ties by error, refit": search("nf4"),
        "search, int4, ties by error, refit": search("int4"),
        "no search, nf4, refit": search("nf4", icq=False),
        "entropy of the plain codes": lambda: icq_native.plain_entropy(blocks, "nf4"),
        "codes, packed and measured": lambda: icq_native.encode(blocks, scale, tau, "nf4"),
    }
    runs = {
        f"{name} | {isa}": partial(on, isa, run)
        for name, run in parts.items()
        for isa in ("scalar", "avx2", "avx512", "neon")
        if _native.isa_supported(isa)
    }
    runs["storage of scale and offset (numpy)"] = lambda: store_scales(
        scale.reshape(size, -1), tau.reshape(size, -1), BlockSpec("nf4"), shape
    )
    runs["all, --icq"] = lambda: quantize_tensor(weight, BlockSpec("nf4"), SearchConfig())
    runs["all, default"] = lambda: quantize_tensor(weight, BlockSpec("nf4"), SearchConfig(icq=False))
    return interleaved(runs, rounds)


def random_bf16(shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Normal weights of a trained model's size, as the bits of bf16."""
    weights = (torch.randn(shape) * 0.02).bfloat16()
    bits: NDArray[np.uint16] = weights.view(torch.int16).numpy().view(np.uint16)
    return bits


def write_model(folder: Path, hidden: int, inner: int, blocks: int, vocabulary: int) -> None:
    """A Hugging Face directory of a LLaMA with random bf16 weights; every block is the same."""
    square, wide, high = (hidden, hidden), (hidden, inner), (inner, hidden)
    layers = dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), square)
    layers |= {"mlp.gate_proj": high, "mlp.up_proj": high, "mlp.down_proj": wide}
    layers |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    block = {name: random_bf16(shape) for name, shape in layers.items()}
    tensors = {f"model.layers.{i}.{name}": data for i in range(blocks) for name, data in block.items()}
    tensors["model.norm"] = block["input_layernorm"]
    tensors["model.embed_tokens"] = tensors["lm_head"] = random_bf16((vocabulary, hidden))
    specs = [TensorSpec(f"{name}.weight", "BF16", data.shape) for name, data in tensors.items()]
    with (folder / "model.safetensors").open("xb") as file, SafeTensorsWriter(file, specs) as writer:
        for spec, data in zip(specs, tensors.values(), strict=True):
            writer.write(spec.name, data)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def bench_model(hidden: int, inner: int, blocks: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """Seconds of ``quantize`` on a model, from the safetensors file to the finished checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model"), Path(folder, "checkpoint")
        source.mkdir()
        write_model(source, hidden, inner, blocks, vocabulary)
        runs: dict[str, Callable[[], object]] = {
            f"quantize {name}": partial(quantize, source, target, icq=icq, overwrite=True)
            for name, icq in (("--icq", True), ("(default)", None))
        }
        return interleaved(runs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["matrix", "model"], nargs="+", default=["matrix", "model"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=1, help="of the model; LLaMA-7B has 32")
    parser.add_argument("--vocabulary", type=int, default=256, help="LLaMA-7B has 32000")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    hidden, inner = (256, 512) if arguments.smoke else (4096, 11008)
    torch.manual_seed(0)
    result: dict[str, object] = {"threads": torch.get_num_threads(), "isa": _native.isa()}
    print(f"{torch.get_num_threads()} threads; minutes: {MODEL_WEIGHTS:,} weights, a LLaMA-7B's linears")
    tables: dict[str, tuple[int, Callable[[], dict[str, float]]]] = {
        "matrix": (hidden**2, lambda: bench_matrix(hidden, rounds)),
        "model": (
            arguments.blocks * hidden * (4 * hidden + 3 * inner),
            lambda: bench_model(hidden, inner, arguments.blocks, arguments.vocabulary, rounds),
        ),
    }
    for title in arguments.only:
        weights, run = tables[title]
        rows = result[title] = run()
        print(f"\n{title}, {weights:,} weights")
        for name, seconds in rows.items():
            print(f"  {name:46} {seconds:8.3f} s  {seconds / weights * MODEL_WEIGHTS / 60:6.2f} min")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
