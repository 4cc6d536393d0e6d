"""``irq-export evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irq_export.cli.common import emit, json_option, progress, verb

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command(short_help="Run benchmarks on one model, or on two side by side.")
@click.argument("models", metavar="MODEL [MODEL]", nargs=-1, required=True, type=_PATH)
@click.option(
    "--tasks",
    required=True,
    help="Comma-separated: wikitext2, mmlu, mmlu_val, hellaswag, piqa, winogrande, arc_easy, arc_challenge, "
    "boolq, openbookqa.",
)
@click.option("--data", required=True, type=_PATH, help="Folder of their files; nothing is downloaded.")
@click.option("--adapter", type=_PATH, help="PEFT directory, for checkpoints (default: their own).")
@click.option("--adapter-gguf", type=_PATH, help="Separate adapter file, for GGUF files.")
@click.option("--adapter-onnx", type=_PATH, help="Adapter file, for ONNX folders (default: their only one).")
@click.option(
    "--runtime",
    type=click.Choice(["native", "reference", "llama.cpp", "onnxruntime+irq", "onnxruntime"]),
    help="For GGUF files (default: native) and ONNX folders (default: onnxruntime+irq).",
)
@click.option(
    "--mode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True, help="Of native."
)
@click.option("-t", "--threads", type=click.IntRange(1, 256), default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="For checkpoints: cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    default="float32",
    show_default=True,
    help="For checkpoints.",
)
@click.option(
    "--batch-tokens", type=click.IntRange(1), default=4096, show_default=True, help="For checkpoints."
)
@click.option("--limit", type=click.IntRange(1), help="Draw so many questions of each task (default: all).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the drawing.")
@click.option("--window", type=click.IntRange(4), default=512, show_default=True, help="Tokens, wikitext2.")
@json_option
@verb
def command(models: tuple[Path, ...], tasks: str, as_json: bool, **options: Any) -> None:
    """Run benchmarks on MODEL: a checkpoint, a Hugging Face directory, a GGUF file, a stock pair, or a folder
    that to-onnx wrote.

    With two models both columns are printed, with the differences and their paired standard errors: what an
    export changed, question by question.
    """
    from irq_export.evaluate.run import evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with progress("evaluate") as update:
        report = evaluate(models, tasks=names, progress=update, **options)
    emit(report.to_dict(), report.to_text(), as_json=as_json)
