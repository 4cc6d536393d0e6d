"""``irq-export to-gguf``: pack a checkpoint into GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irq_export.cli.common import emit, force_option, json_option, progress, verb

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("to-gguf")
@click.argument("checkpoint", type=_PATH)
@click.option(
    "-o", "--output", required=True, type=_PATH, help="File to write; for profile stock a directory."
)
@click.option(
    "--profile",
    type=click.Choice(["irq", "stock"]),
    default="irq",
    show_default=True,
    help="irq: one file for our runtime, bit for bit. stock: a pair of files for unmodified llama.cpp.",
)
@click.option("--adapter-dir", type=_PATH, help="PEFT adapter (default: the checkpoint's own, if any).")
@click.option(
    "--adapter",
    type=click.Choice(["keep", "fold", "merge", "drop"]),
    default="keep",
    show_default=True,
    help="fold: elastic connections into A and B. merge: into the weights, with --merge TYPE.",
)
@click.option(
    "--separate-adapter", is_flag=True, help="Profile irq: write STEM.adapter.gguf beside the model."
)
@click.option(
    "--merge",
    type=click.Choice(["f16", "bf16", "f32"]),
    help="One stock file of floating-point weights, adapter merged in float64 and rounded once.",
)
@click.option(
    "--int2-type",
    type=click.Choice(["auto", "q2_0", "q4_0"]),
    help="Profile stock, int2. auto: q2_0 (llama.cpp of July 2026 or later) where blocks are 64.  "
    "[default: auto]",
)
@click.option(
    "--nf-type",
    type=click.Choice(["q8_0", "bf16"]),
    help="Profile stock, nf4, nf3, nf2. q8_0: codes one to one. bf16: the decoded weights.  [default: q8_0]",
)
@click.option("--pre-tokenizer", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if unknown.")
@click.option("--dry-run", is_flag=True, help="Print tensors, bytes and peaks; write nothing.")
@force_option
@json_option
@verb
def command(
    checkpoint: Path, output: Path, dry_run: bool, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Pack CHECKPOINT into GGUF and read it back.

    Codes, scales and offsets are moved bit for bit; nothing is searched or quantised again. An adapter
    trained against another base is refused.
    """
    from irq_export.export.gguf import plan_gguf, to_gguf

    if dry_run:
        plan = plan_gguf(checkpoint, output, **options)
        emit(plan.to_dict(), plan.to_text(), as_json=as_json)
        return
    with progress("to-gguf") as update:
        result = to_gguf(checkpoint, output, overwrite=overwrite, progress=update, **options)
    emit(result.to_dict(), result.to_text(), as_json=as_json)
