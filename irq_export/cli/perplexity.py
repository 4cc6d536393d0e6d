"""``irq-export perplexity``."""

from __future__ import annotations

from pathlib import Path

import click

from irq_export.cli.common import (
    emit,
    force_option,
    json_option,
    progress,
    threads_option,
    tokenizer_option,
    verb,
)

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command(short_help="Measure how well a GGUF file predicts a text.")
@click.argument("model", metavar="FILE", type=_PATH)
@click.argument("text", type=_PATH)
@click.option("--adapter", type=_PATH, help="Separate adapter file.")
@click.option("--adapter-scale", type=float, default=1.0, show_default=True, help="Its multiplier.")
@tokenizer_option
@click.option("--runtime", type=click.Choice(["native", "reference"]), default="native", show_default=True)
@click.option(
    "--mode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True, help="Of native."
)
@threads_option
@click.option(
    "-c", "--context", type=click.IntRange(4), default=512, show_default=True, help="Tokens a window."
)
@click.option("--windows", type=click.IntRange(1), help="Read so many at most (default: all).")
@click.option("--save-logits", type=_PATH, help="Write the scored logits here (large).")
@click.option("--kl-against", type=_PATH, help="Logits saved from another model or mode.")
@force_option
@json_option
@verb
def command(
    model: Path,
    text: Path,
    adapter: Path | None,
    adapter_scale: float,
    tokenizer: Path | None,
    runtime: str,
    mode: str,
    threads: int,
    context: int,
    windows: int | None,
    save_logits: Path | None,
    kl_against: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure the perplexity of FILE on TEXT, in llama-perplexity's convention.

    FILE is a GGUF or the directory of a stock pair.
    """
    from irq_export.perplexity import perplexity

    with progress("perplexity") as update:
        report = perplexity(
            model=model,
            text=text,
            adapter=adapter,
            adapter_scale=adapter_scale,
            tokenizer=tokenizer,
            runtime=runtime,
            mode=mode,
            threads=threads,
            context=context,
            windows=windows,
            save_logits=save_logits,
            kl_against=kl_against,
            overwrite=overwrite,
            progress=update,
        )
    emit(report.to_dict(), report.to_text(), as_json=as_json)
