"""``irq-export demo``: the whole way, on the model that ships in this package."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from irq_export.cli.common import console, emit, json_option, verb
from irq_formats.errors import OutputExists, ParityFailed

__all__ = ["command"]

_PROMPT = "Once upon a time"


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Keep the files here (default: they are removed)."
)
@json_option
@verb
def command(output: Path | None, as_json: bool) -> None:
    """Quantise, export, run and prove the model that ships in this package.

    A small Llama is quantised with ICQ to nf4 and to int4; a LoRA with elastic connections is put on it;
    nf4 goes into our GGUF, int4 into a pair for unmodified llama.cpp; both are run and compared with
    PyTorch, weight by weight and logit by logit.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        if output is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="irq-demo-")))
        elif output.exists():
            raise OutputExists("exists", where=output, hint="Choose another directory")
        else:
            directory = output
            directory.mkdir(parents=True)
        results = [
            _prove(directory, "nf4", "irq", directory / "nf4.gguf"),
            _prove(directory, "int4", "stock", directory / "int4-stock"),
        ]
    wall_s = time.perf_counter() - started
    passed = all(result["report"]["passed"] for result in results)
    text = "\n\n".join(result.pop("text") for result in results)
    verdict = "proved equal to the PyTorch model" if passed else "NOT equal to the PyTorch model"
    emit(
        {"passed": passed, "wall_s": round(wall_s, 2), "results": results},
        f"{text}\n\nboth files {verdict} in {wall_s:.1f} s" + (f"; files in {output}" if output else ""),
        as_json=as_json,
    )
    if not passed:
        raise ParityFailed("the demo's files do not compute what the checkpoint computes")


def _prove(directory: Path, codebook: str, profile: str, exported: Path) -> dict[str, Any]:
    """Quantise, adapt, export, run and verify; return what happened, with a text for people."""
    from irq_export.export.gguf import to_gguf
    from irq_export.iec import random_adapter
    from irq_export.parity.runtimes import ReferenceRuntime
    from irq_export.parity.target import open_target
    from irq_export.parity.verify import verify
    from irq_export.quantize_model import quantize
    from irq_export.quantizer import load_model
    from irq_formats.checkpoint import open_checkpoint
    from irq_formats.peft_adapter import write_peft_adapter

    screen = console()
    checkpoint = directory / f"{codebook}-checkpoint"
    screen.print(f"quantising to {codebook} with ICQ ...")
    quantize(Path(__file__).parent.parent / "demo_model", checkpoint, codebook=codebook, icq=True)
    base_hash = open_checkpoint(checkpoint).base_hash
    adapter = random_adapter(load_model(checkpoint), rank=8, seed=0, base_hash=base_hash)
    adapter_dir = directory / f"{codebook}-adapter"
    write_peft_adapter(adapter_dir, adapter, base_model_name=str(checkpoint))
    screen.print(f"packing profile {profile} ...")
    packed = to_gguf(checkpoint, exported, profile=profile, adapter_dir=adapter_dir)
    target = open_target(exported)
    text = _generate(ReferenceRuntime(target.model, target.adapter, 1.0, "float32"), target)
    screen.print("comparing with PyTorch ...")
    report = verify(exported, against=checkpoint, adapter=adapter_dir)
    bytes_on_disk = sum(file.nbytes for file in packed.files)
    summary = (
        f"{codebook}, profile {profile}: {packed.bits_per_weight:.3f} bits per weight, "
        f"{bytes_on_disk / 1e6:.2f} MB\n{_PROMPT}{text}\n{report.to_text()}"
    )
    return {
        "codebook": codebook,
        "profile": profile,
        "bits_per_weight": packed.bits_per_weight,
        "file_bytes": bytes_on_disk,
        "generated": text,
        "report": report.to_dict(),
        "text": summary,
    }


def _generate(runtime: Any, target: Any) -> str:
    """Continue the prompt greedily; return the new text."""
    from irq_runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(target.gguf)
    text: str = tokenizer.decode(runtime.greedy(tokenizer.encode(_PROMPT), 40))
    return text
