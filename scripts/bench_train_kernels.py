"""Speed and memory of the training kernels on one GPU: ours, torch, bitsandbytes' QLoRA, the released way.

Two tables. The search: a matrix of normal weights, 201 candidates. The layer: the seven linear layers of a
LLaMA-7B block with rank-64 adapters, forward and backward. All arms of a table are interleaved in one run,
medians, but for the released way of searching, which takes longer than all others together. Beside them stand
the floors measured in the same run: the time of the matrix products alone and of moving the bytes.

    python scripts/bench_train_kernels.py --json result.json
    python scripts/bench_train_kernels.py --smoke          # tiny shapes, also on a CPU: does everything run?

Of a CPU: scripts/bench_quantize.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irq_export import kernels
from irq_export.block_linear import decode
from irq_export.block_modules import IrqLinear
from irq_export.icq_search import SIGMA, SearchConfig, search_blocks
from irq_export.iec import IecLinear, add_elastic
from irq_formats.blocks import BlockSpec, part_layout

RANK, ALPHA = 64, 16
GROUPS = ("q", "k", "v"), ("o",), ("gate", "up"), ("down",)  # layers that read the same input


def shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a LLaMA block."""
    square = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
    return square | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


@contextmanager
def without_triton() -> Iterator[None]:
    """Our code on its torch path."""
    with mock.patch.object(kernels, "available", return_value=False):
        yield


def on_torch(run: Callable[[], object]) -> Callable[[], object]:
    """The same on the torch path."""

    def torch_run() -> object:
        with without_triton():
            return run()

    return torch_run


# --- timing -------------------------------------------------------------------------------------------


def once(run: Callable[[], object], device: torch.device, queued: int) -> float:
    """Milliseconds of one run, of several in a row: between the steps of a training nothing waits either."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()  # the queue is not empty when the clock starts
    begin.record()
    for _ in range(queued):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / queued


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, queued: int = 3
) -> dict[str, dict[str, float]]:
    """Median and quartiles of each, milliseconds; in turn in every round, the first two rounds unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            elapsed = once(run, device, queued)
            if number >= 2:
                times[name].append(elapsed)
    return {
        name: dict(
            zip(("q1", "median", "q3"), statistics.quantiles(values, n=4, method="inclusive"), strict=True)
        )
        for name, values in times.items()
    }


def peak(run: Callable[[], object], model: nn.Module, device: torch.device) -> int:
    """Bytes allocated at the peak of a step beyond the layers, their inputs and the gradients given."""
    if device.type != "cuda":
        return 0
    run()
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- the search ---------------------------------------------------------------------------------------


def released_search(blocks: Tensor) -> Tensor:
    """Offsets as the released code finds them: one bitsandbytes quantisation and 16 counts a candidate."""
    from bitsandbytes.functional import quantize_4bit

    median = blocks.median(dim=1).values
    reach = (blocks - median[:, None]).abs().amax(dim=1)
    best, tau = torch.full_like(median, -1.0), median.clone()
    for step in range(-100, 101):
        candidate = step / 100 * 0.1 * SIGMA * reach + median
        residual = (blocks - candidate[:, None]).half()
        packed = quantize_4bit(residual, blocksize=blocks.shape[1], quant_type="nf4")[0].view(len(blocks), -1)
        entropy = torch.zeros_like(best)
        for code in range(16):
            share = ((packed >> 4 == code).sum(1) + (packed & 15 == code).sum(1)) / blocks.shape[1]
            entropy += torch.nan_to_num(-share * share.log2())
        tau = torch.where(entropy > best, candidate, tau)
        best = torch.maximum(best, entropy)
    return tau


def bench_search(size: int, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    blocks = torch.randn(size * size // 64, 64, device=device) * 0.02
    paper = SearchConfig(tie="first", refine="none")

    def run(codebook: str, config: SearchConfig) -> Callable[[], object]:
        return lambda: search_blocks(blocks, codebook, config, with_tau=True, pairs_at_once=1 << 24)

    runs = {
        "nf4, default (ties by error, refit)": run("nf4", SearchConfig()),
        "nf4, the paper's (first of ties)": run("nf4", paper),
        "nf3, default": run("nf3", SearchConfig()),
        "nf2, default": run("nf2", SearchConfig()),
        "int4, default": run("int4", SearchConfig()),
        "nf4, objective mse": run("nf4", SearchConfig(objective="mse")),
        "nf4, default, torch": on_torch(run("nf4", SearchConfig())),
    }
    table = interleaved(runs, rounds, device)
    # A round of the released way takes longer than one of all others.
    return table | interleaved({"released-style": lambda: released_search(blocks)}, 2, device, 1)


# --- the layer ----------------------------------------------------------------------------------------


def random_base(shape: tuple[int, int], device: torch.device) -> IrqLinear:
    """An nf4 layer of random parts whose weights have the size of a trained one's."""
    spec = BlockSpec()
    module = IrqLinear(spec, shape[1], shape[0])
    for name, (dtype, part) in part_layout(spec, shape).items():
        value = {"scale_absmax": 0.01, "scale_offset": 0.05, "tau_absmax": 0.004}.get(name)
        random = torch.randint(0, 256, part, dtype=torch.uint8) if value is None else torch.full(part, value)
        module.get_buffer(name).copy_(random.to(getattr(torch, dtype.name)))
    return module.to(device)


class ReleasedLinear(nn.Module):
    """IR-QLoRA's layer as released: autograd keeps the decoded weight, IEC works on activations."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        out, width = weight.shape
        self.packed, self.state = quantize_4bit(weight.half(), quant_type="nf4", compress_statistics=True)
        self.tau = torch.randn(out * width // 64, 1, device=weight.device) * 1e-3
        self.a = nn.Parameter(torch.randn(RANK, width, device=weight.device, dtype=dtype) / width**0.5)
        self.b = nn.Parameter(torch.randn(out, RANK, device=weight.device, dtype=dtype) * 0.01)
        self.betas = nn.Parameter(torch.full((2, 1), 0.05, device=weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(self.packed, self.state).to(x.dtype)
        shifted = weight.view(-1, 64) + self.tau
        y = F.linear(x, shifted.view(weight.shape).to(x.dtype))
        hidden = add_elastic(F.linear(x, self.a), x, self.betas[0])
        return y + ALPHA / RANK * add_elastic(F.linear(hidden, self.b), hidden, self.betas[1])


def qlora(layers: dict[str, tuple[int, int]], dtype: torch.dtype, device: torch.device) -> nn.ModuleDict:
    """bitsandbytes' Linear4bit (NF4, double quantisation) under PEFT's LoRA."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict(
        {
            name: Linear4bit(width, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            for name, (out, width) in layers.items()
        }
    ).to(device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(layers))
    model = inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
    return model


def irqlora(layers: dict[str, tuple[int, int]], dtype: torch.dtype, device: torch.device) -> nn.ModuleDict:
    """Ours: blocks with offsets, IEC."""
    modules = {
        name: IecLinear(random_base(shape, device), RANK, scaling=ALPHA / RANK, dtype=dtype)
        for name, shape in layers.items()
    }
    for module in modules.values():
        nn.init.normal_(module.lora_b, std=0.01)
        nn.init.constant_(module.beta1, 0.05)
        nn.init.constant_(module.beta2, 0.05)
    return nn.ModuleDict(modules)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, buffers and quantisation states of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    return sum(t.numel() * t.element_size() for t in tensors)


def outputs_of(model: nn.ModuleDict, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Forward of all layers."""
    return [model[name](x) for name, x in inputs.items()]


def step(
    model: nn.ModuleDict,
    inputs: dict[str, Tensor],
    grads: dict[str, Tensor],
    autocast: bool,
    forward: Callable[[nn.ModuleDict, dict[str, Tensor]], list[Tensor]] = outputs_of,
) -> None:
    """Forward and backward of all layers; every group of layers reads one input."""
    for parameter in model.parameters():
        parameter.grad = None
    for x in inputs.values():
        x.grad = None
    device = next(iter(inputs.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        outputs = forward(model, inputs)
    torch.autograd.backward(outputs, list(grads.values()))


def bench_layer(
    hidden: int, inner: int, tokens: int, rounds: int, device: torch.device, compiled: bool
) -> dict[str, dict[str, float]]:
    layers = shapes(hidden, inner)
    bf16 = torch.bfloat16
    inputs: dict[str, Tensor] = {}
    for group in GROUPS:
        x = torch.randn(1, tokens, layers[group[0]][1], device=device, dtype=bf16).requires_grad_()
        inputs |= dict.fromkeys(group, x)
    grads = {
        name: torch.randn(1, tokens, out, device=device, dtype=bf16) * 1e-3
        for name, (out, _) in layers.items()
    }
    ours, ours16 = irqlora(layers, torch.float32, device), irqlora(layers, bf16, device)
    bnb, bnb16 = qlora(layers, torch.float32, device), qlora(layers, bf16, device)
    weights = {name: decode(ours[name].base.parts(), bf16) for name in layers}
    plain = nn.ModuleDict(
        {n: nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for n, w in weights.items()}
    )
    for name, weight in weights.items():
        plain[name].weight = nn.Parameter(weight, requires_grad=False)
    released = nn.ModuleDict({name: ReleasedLinear(weight, bf16) for name, weight in weights.items()})

    runs: dict[str, Callable[[], object]] = {
        "matrix products alone (bf16 weights, no adapter)": lambda: step(plain, inputs, grads, False),
        "QLoRA, fp32 adapter, autocast": lambda: step(bnb, inputs, grads, True),
        "ours, fp32 adapter, autocast": lambda: step(ours, inputs, grads, True),
        "QLoRA, bf16 adapter": lambda: step(bnb16, inputs, grads, False),
        "ours, bf16 adapter": lambda: step(ours16, inputs, grads, False),
    }
    models = [plain, bnb, ours, bnb16, ours16]
    if compiled:
        runs |= {
            f"{name}, fp32 adapter, autocast, compiled": partial(
                step, model, inputs, grads, True, torch.compile(outputs_of)
            )
            for name, model in (("QLoRA", bnb), ("ours", ours))
        }
        models += [bnb, ours]
    runs |= {
        "ours on its torch path, fp32 adapter, autocast": on_torch(lambda: step(ours, inputs, grads, True)),
        "released-style IR-QLoRA, bf16 adapter": lambda: step(released, inputs, grads, False),
    }
    table = interleaved(runs, rounds, device)
    for (name, run), model in zip(runs.items(), [*models, ours, released], strict=True):
        table[name]["peak_mb"] = peak(run, model, device) / 1e6
        if model is not released:
            table[name]["stored_mb"] = stored_bytes(model) / 1e6
    return table


def bench_decode(hidden: int, inner: int, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Decoding of one matrix to bf16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = random_base((inner, hidden), device)
    weight = decode(base.parts(), torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    target = torch.empty_like(weight)
    runs: dict[str, Callable[[], object]] = {
        "ours, with offsets": lambda: decode(base.parts(), torch.bfloat16),
        "bitsandbytes": lambda: dequantize_4bit(packed, state),
        "floor: a copy that moves the same bytes": lambda: target[: len(target) * 253 // 400].copy_(
            weight[: len(target) * 253 // 400]
        ),
    }
    return interleaved(runs | {"torch": on_torch(runs["ours, with offsets"])}, rounds, device)


def bench_machine(device: torch.device, size: int) -> dict[str, dict[str, float]]:
    """Rates of a copy (bytes read plus written) and of a bf16 product."""
    source = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: source @ source}, 10, device
    )
    return {
        "copy": {"gb_per_s": 2 * source.numel() * 2 / times["copy"]["median"] / 1e6},
        "product": {"tflop_per_s": 2 * size**3 / times["product"]["median"] / 1e9},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    tables = ["machine", "decode", "layer", "search"]
    parser.add_argument("--only", choices=tables, nargs="+", default=tables)
    parser.add_argument("--compile", action="store_true", help="the layer under torch.compile too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, rounds = arguments.smoke, 2 if arguments.smoke else arguments.rounds
    hidden, inner, tokens = (256, 512, 32) if small else (arguments.hidden, arguments.inner, arguments.tokens)
    torch.manual_seed(0)
    result: dict[str, object] = {
        "torch": torch.__version__,
        "tokens": tokens,
        "hidden": hidden,
        "inner": inner,
    }
    parts: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
        "machine": lambda: bench_machine(device, 256 if small else 8192),
        "decode": lambda: bench_decode(hidden, inner, rounds, device),
        "layer": lambda: bench_layer(hidden, inner, tokens, rounds, device, arguments.compile),
        "search": lambda: bench_search(hidden, rounds, device),
    }
    for title, run in parts.items():
        if title not in arguments.only:
            continue
        rows = result[title] = run()
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"  {name:52}", "  ".join(f"{key} {value:9.3f}" for key, value in row.items()), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
