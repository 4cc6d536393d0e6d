"""``irq-export to-onnx``: write a checkpoint as an ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irq_export.cli.common import emit, force_option, json_option, progress, verb

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("to-onnx")
@click.argument("checkpoint", type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="Directory to write.")
@click.option(
    "--adapter",
    "adapters",
    type=_PATH,
    multiple=True,
    help="PEFT adapter, written as NAME.onnx_adapter (repeatable; default: the checkpoint's own, if any).",
)
@click.option("--bake-adapter", is_flag=True, help="Put the adapter into the model instead, unmerged.")
@click.option(
    "--adapter-slots/--no-adapter-slots",
    default=True,
    help="Inputs of every linear layer for an adapter.  [default: yes]",
)
@click.option(
    "--profile",
    type=click.Choice(["irq", "stock"]),
    default="irq",
    show_default=True,
    help="irq: one operator a matrix, with a function body for runtimes without our library. "
    "stock: the bodies alone.",
)
@click.option(
    "--attention",
    type=click.Choice(["gqa", "standard"]),
    default="gqa",
    show_default=True,
    help="gqa: onnxruntime's GroupQueryAttention, as onnxruntime-genai wants it. standard: attention in "
    "plain ONNX operators; nf4 and int4 matrices still need onnxruntime's own.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16"]),
    default="f32",
    show_default=True,
    help="Of activations, scales and offsets. f16 rounds offsets and what is not quantised.",
)
@click.option(
    "--int-bits",
    type=click.Choice(["4", "own"]),
    default="4",
    show_default=True,
    help="int3 and int2: 4 carries them in 4 bits, fast in stock onnxruntime; own keeps their bits.",
)
@click.option("--context", type=int, help="Positions to export for (default: those of the model).")
@click.option(
    "--library",
    is_flag=True,
    help="Put our library, built for this machine, beside the model, where onnxruntime-genai loads it.",
)
@click.option("--dry-run", is_flag=True, help="Print tensors, bytes and peaks; write nothing.")
@force_option
@json_option
@verb
def command(
    checkpoint: Path, output: Path, dry_run: bool, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Write CHECKPOINT as an ONNX model and read it back.

    Codes, scales and offsets are moved bit for bit. Adapters stay unmerged: each becomes a file that
    onnxruntime swaps at run time. An adapter trained against another base is refused.
    """
    from irq_export.export.onnx import plan_onnx, to_onnx

    if dry_run:
        plan = plan_onnx(checkpoint, output, **options)
        emit(plan.to_dict(), plan.to_text(), as_json=as_json)
        return
    with progress("to-onnx") as update:
        result = to_onnx(checkpoint, output, overwrite=overwrite, progress=update, **options)
    emit(result.to_dict(), result.to_text(), as_json=as_json)
