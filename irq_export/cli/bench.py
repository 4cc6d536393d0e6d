"""``irq-export bench``: speed of the native engine, without torch."""

from __future__ import annotations

from pathlib import Path

import click

from irq_export.cli.common import emit, json_option, progress, threads_option, verb

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command(short_help="Measure the speed of a GGUF file.")
@click.argument("model", metavar="FILE", type=_PATH)
@click.option("--adapter", type=_PATH, help="Separate adapter file.")
@click.option(
    "--mode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True, help="Of the engine."
)
@threads_option
@click.option(
    "-p",
    "--prompt",
    type=click.IntRange(1),
    multiple=True,
    help="Length of a prompt; repeatable (default: 512).",
)
@click.option(
    "-n",
    "--generate",
    type=click.IntRange(1),
    multiple=True,
    help="Tokens to generate; repeatable (default: 128).",
)
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("--half-cache", is_flag=True, help="Keep keys and values in fp16.")
@json_option
@verb
def command(
    model: Path,
    adapter: Path | None,
    mode: str,
    threads: int,
    prompt: tuple[int, ...],
    generate: tuple[int, ...],
    repetitions: int,
    half_cache: bool,
    as_json: bool,
) -> None:
    """Measure how fast FILE reads prompts (pp) and generates tokens (tg) on this machine.

    FILE is a GGUF or the directory of a stock pair. Generated tokens come with the bytes each reads and
    their share of the measured memory bandwidth.
    """
    from irq_runtime.bench import bench

    chosen = prompt or generate
    with progress("bench") as update:
        report = bench(
            model=model,
            adapter=adapter,
            mode=mode,
            threads=threads,
            prompt=prompt if chosen else (512,),
            generate=generate if chosen else (128,),
            repetitions=repetitions,
            half_cache=half_cache,
            progress=update,
        )
    emit(report.to_dict(), report.to_text(), as_json=as_json)
