"""Training on two devices against one: equal gradients, equal curves, and what a step costs.

Two parts, each with three arms: one process, DDP and FSDP2 over all devices (NCCL on GPUs, gloo on a CPU).

* equality: a random model of eight layers of SmolLM2's width in floating point, which every arm quantises
  itself, in float32 with examples of many lengths. Compared are the base hash, the gradients of the first
  step, the losses of all steps, the adapter in the end, and the logits of the directory that each arm left.
* speed: a checkpoint of random bytes of the shape of TinyLlama (or LLaMA-7B) in bf16, rows of 512 tokens, the
  recipe of the paper. All arms compute micro-batches of the same size, so that memory differs by what is
  sharded alone.

The arms of a part load at the same time and take their steps one after the other.

    python scripts/bench_multi_gpu.py /tmp/multi --json result.json
    python scripts/bench_multi_gpu.py /tmp/multi --only speed --shape 7b
    python scripts/bench_multi_gpu.py /tmp/multi --smoke     # tiny shapes, two gloo processes on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.checkpoint import hf_tensor_shapes
from irq_formats.checkpoint_writer import checkpoint_writer
from irq_formats.model import ModelConfig
from irq_formats.names import linear_names
from irq_formats.peft_adapter import read_peft_adapter
from irq_formats.safetensors_io import TensorSpec

DEMO = Path(__file__).resolve().parents[1] / "irq_export" / "demo_model"  # its tokenizer
ARMS = ("one", "ddp", "fsdp")
WARM_UP = 3  # steps that are not timed

Json = dict[str, Any]
Process = subprocess.Popen[bytes]


def llama(hidden: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int, tied: bool) -> Json:
    """A config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "7b": llama(4096, 11008, 32, 32, 32, 32000, tied=False),  # LLaMA
    "1.1b": llama(2048, 5632, 22, 32, 4, 32000, tied=False),  # TinyLlama
    "57m": llama(576, 1536, 8, 9, 3, 49152, tied=True),  # of SmolLM2's width
    "tiny": llama(64, 128, 2, 4, 2, 1024, tied=True),
}

# --- models and data ----------------------------------------------------------------------------------


def write_float_model(path: Path, shape: str) -> None:
    """A model with random weights, bf16, as transformers saves it."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(path)


def random_parts(shape: tuple[int, int], rng: np.random.Generator) -> BlockTensor:
    """An nf4 matrix of random bytes whose weights have the size of a trained one's."""
    fixed = {"scale_absmax": 0.01, "scale_offset": 0.02, "tau_absmax": 0.002}
    parts = {
        name: np.full(part, fixed[name], dtype)
        if name in fixed
        else rng.integers(0, 256, part, dtype=np.uint8).view(dtype)
        for name, (dtype, part) in part_layout(BlockSpec(), shape).items()
    }
    return BlockTensor(BlockSpec(), shape, parts)


def write_checkpoint(path: Path, shape: str) -> None:
    """A checkpoint of random bytes; matrices of one shape are equal."""
    model = ModelConfig.from_hf(SHAPES[shape])
    linears, rng = set(linear_names(model)), np.random.default_rng(0)
    blocks: dict[tuple[int, int], BlockTensor] = {}
    with checkpoint_writer(path) as writer:
        for name, sizes in hf_tensor_shapes(model).items():
            module = name.removesuffix(".weight")
            if module in linears:
                key = (sizes[0], sizes[1])
                if key not in blocks:
                    blocks[key] = random_parts(key, rng)
                writer.add_block(module, blocks[key])
                continue
            writer.add_plain(TensorSpec(name, "BF16", sizes), partial(random_bf16, sizes))
        for file in DEMO.glob("tokenizer*"):
            writer.copy_file(DEMO, file)
        writer.finish(SHAPES[shape], spec=BlockSpec(), skipped={}, search={"random": True})


def random_bf16(shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Ones for a norm, else normal numbers times 0.02; the bits of bf16."""
    rng = np.random.default_rng(1)
    values = (
        np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, np.float32) * np.float32(0.02)
    )
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_data(path: Path, rows: int, words: tuple[int, int]) -> None:
    """Rows of random words, so many in an answer."""
    rng = np.random.default_rng(2)
    known = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "boats", "sail"]

    def text(count: int) -> str:
        return " ".join(known[i] for i in rng.integers(0, len(known), count))

    data = [{"instruction": text(5), "output": text(int(rng.integers(*words)))} for _ in range(rows)]
    path.write_text(json.dumps(data))


# --- one process of an arm ----------------------------------------------------------------------------


class Probe(TrainerCallback):
    """Watches the steps of one process, which begin when it is the turn of its arm."""

    def __init__(self, arm: Path, *, gradients: bool) -> None:
        self.arm = arm  # with .ready, .go and .done, signs between its first process and the script
        self.gradients = gradients
        self.times: list[float] = []  # s, of every step
        self.losses: list[float] = []
        self.peak = 0  # bytes, of the steps after the first
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.arm.with_suffix(".ready").touch()
        while not self.arm.with_suffix(".go").exists():
            time.sleep(0.05)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients or state.global_step:
            return
        whole: Json = {}
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:  # every process takes part in gathering
                gradient = parameter.grad
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                whole[name.removeprefix("module.")] = gradient.float().cpu()
        if state.is_world_process_zero:
            torch.save(whole, self.arm.with_suffix(".pt"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now
        if torch.cuda.is_available():
            if state.global_step == 1:
                torch.cuda.reset_peak_memory_stats()
            self.peak = torch.cuda.max_memory_allocated()
        if state.global_step == state.max_steps and state.is_world_process_zero:
            self.arm.with_suffix(".done").touch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def work(folder: Path, arm: str, settings: Json, *, gradients: bool) -> None:
    """Train in this process, one of an arm, and write down what it saw."""
    from irq_export.train.config import make_config
    from irq_export.train.run import train

    probe = Probe(folder / arm, gradients=gradients)
    started = time.perf_counter()
    report = train(make_config(settings), callbacks=[probe])
    seen = {
        "base_hash": report.base_hash,
        "trainable": report.trainable,
        "losses": probe.losses,
        "step_s": statistics.median(probe.times[WARM_UP:]),
        "steps_peak_gb": probe.peak / 1e9,
        "whole_peak_gb": (report.peak_bytes or 0) / 1e9,
        "seconds": time.perf_counter() - started,
    }
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"{arm}.{rank}.json").write_text(json.dumps(seen))


# --- arms ---------------------------------------------------------------------------------------------


def start_arm(folder: Path, arm: str, devices: int, settings: Json, *, gradients: bool) -> Process:
    """Start the processes of an arm."""
    output = folder / arm
    shutil.rmtree(output, ignore_errors=True)
    spoken = {**settings, "output": str(output), "fsdp": arm == "fsdp"}
    command = [sys.executable]
    if arm != "one":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    command += [__file__, str(folder), "--work", json.dumps(spoken), "--arm", arm]
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"}
    if settings["device"] == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    with (folder / f"{arm}.log").open("wb") as log:
        return subprocess.Popen(
            command + ["--gradients"] * gradients, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def run_arms(folder: Path, devices: int, settings: Json, *, gradients: bool) -> dict[str, list[Json]]:
    """Run all arms; return what every process of those that came through saw."""
    for old in (path for arm in ARMS for path in folder.glob(f"{arm}.*")):
        old.unlink()

    def wait(arm: str, sign: str) -> None:
        while running[arm].poll() is None and not (folder / f"{arm}.{sign}").exists():
            time.sleep(0.1)

    running = {arm: start_arm(folder, arm, devices, settings, gradients=gradients) for arm in ARMS}
    for arm in ARMS:
        wait(arm, "ready")
    for arm in ARMS:
        (folder / f"{arm}.go").touch()
        wait(arm, "done")
    seen = {}
    for arm, process in running.items():
        if process.wait():
            log = (folder / f"{arm}.log").read_text(errors="replace")
            print(f"{arm} failed:\n{log[-4000:]}", flush=True)
            continue
        count = 1 if arm == "one" else devices
        seen[arm] = [json.loads((folder / f"{arm}.{rank}.json").read_text()) for rank in range(count)]
    return seen


def largest_difference(one: Json, other: Json) -> float:
    """Largest error of any tensor, of its largest magnitude; infinite for other tensors."""
    if one.keys() != other.keys():
        return float("inf")
    worst = 0.0
    for name, expected in one.items():
        scale = float(abs(expected).max())
        error = float(abs(other[name] - expected).max())
        worst = max(worst, error / scale if scale else error)
    return worst


def adapter_arrays(run: Path) -> Json:
    """A, B and betas of the adapter of a run."""
    arrays: Json = {}
    for name, layer in read_peft_adapter(run / "adapter").layers.items():
        betas = np.array([layer.beta1, layer.beta2])
        arrays |= {f"{name}.a": layer.lora_a, f"{name}.b": layer.lora_b, f"{name}.betas": betas}
    return arrays


@torch.inference_mode()
def logits(run: Path, device: str) -> NDArray[np.float32]:
    """What the directory of a run computes."""
    from irq_export.iec import attach
    from irq_export.quantizer import load_model

    model = load_model(run, device=device)  # checks manifest and base hash
    attach(model, read_peft_adapter(run / "adapter"))
    ids = torch.arange(128, device=device)[None] * 7 % 1000
    found: NDArray[np.float32] = model(ids).logits.float().cpu().numpy()
    return found


def compare(folder: Path, seen: dict[str, list[Json]], device: str) -> Json:
    """Every arm that came through against one process."""
    if "one" not in seen:
        return {}
    load = partial(torch.load, weights_only=True)
    gradients, adapters = load(folder / "one.pt"), adapter_arrays(folder / "one")
    outputs = logits(folder / "one", device)
    found = {}
    for arm in (arm for arm in ARMS[1:] if arm in seen):
        one, other = seen["one"][0], seen[arm][0]
        pairs = zip(one["losses"], other["losses"], strict=True)
        theirs = logits(folder / arm, device)
        found[arm] = {
            "same_base": one["base_hash"] == other["base_hash"],
            "gradients": largest_difference(gradients, load(folder / f"{arm}.pt")),
            "losses": max(abs(b - a) / a for a, b in pairs),
            "adapter": largest_difference(adapters, adapter_arrays(folder / arm)),
            "logits_nmse": float(np.square(theirs - outputs).sum() / np.square(outputs).sum()),
        }
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["equality", "speed"], nargs="+", default=["equality", "speed"])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b", help="of the speed part")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder, small = arguments.folder, arguments.smoke
    if arguments.work is not None:
        work(folder, arguments.arm, arguments.work, gradients=arguments.gradients)
        return
    device = "cpu" if small or not torch.cuda.is_available() else "cuda"
    result: Json = {"torch": torch.__version__, "devices": arguments.devices, "device": device}
    common = {"device": device, "log_every": 1, "steps": arguments.steps, "optimizer": "adamw_torch"}
    if "equality" in arguments.only:
        here = folder / "equality"
        here.mkdir(parents=True, exist_ok=True)
        write_float_model(here / "model", "tiny" if small else "57m")
        write_data(here / "data.json", 400, (5, 40) if small else (5, 120))
        settings = {**common, "model": str(here / "model"), "data": [str(here / "data.json")]}
        settings |= {"precision": "fp32", "rank": 4 if small else 32, "lr": 1e-3}
        seen = run_arms(here, arguments.devices, settings, gradients=True)
        result["equality"] = {"arms": seen, "against_one": compare(here, seen, device)}
        print("\nequality: largest relative difference to one process")
        for arm, row in result["equality"]["against_one"].items():
            print(f"  {arm:6}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    if "speed" in arguments.only:
        here = folder / "speed"
        here.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(here / "model", ignore_errors=True)
        write_checkpoint(here / "model", "tiny" if small else arguments.shape)
        write_data(here / "data.json", 64, (330, 400))
        settings = {**common, "model": str(here / "model"), "data": [str(here / "data.json")]}
        settings |= {"micro_batch": 8, "max_length": 64 if small else 512, "rank": 4 if small else 64}
        table = run_arms(here, arguments.devices, settings, gradients=False)
        result["speed"] = {"shape": "tiny" if small else arguments.shape, "arms": table}
        print("\nspeed: a step of 16 rows; peak memory of each device, in the steps and in the whole run")
        for arm, ranks in table.items():
            peaks = ", ".join(
                f"{rank['steps_peak_gb']:.2f} ({rank['whole_peak_gb']:.2f}) GB" for rank in ranks
            )
            print(f"  {arm:6} {1e3 * ranks[0]['step_s']:9.1f} ms  {peaks}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(part in result and set(result[part]["arms"]) != set(ARMS) for part in ("equality", "speed")))


if __name__ == "__main__":
    main()
