"""``irq-export verify``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click

from irq_export.cli.common import json_option, progress, verb
from irq_formats.atomic import atomic_file
from irq_formats.errors import ParityFailed
from irq_formats.preflight import check_file_target

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("verify")
@click.argument("file", type=_PATH)
@click.option("--against", required=True, type=_PATH, help="The checkpoint the file was made from.")
@click.option(
    "--adapter-dir",
    "--adapter",
    "adapters",
    type=_PATH,
    multiple=True,
    help="PEFT adapter directory (default: the checkpoint's own); repeatable for ONNX, one for each adapter.",
)
@click.option("--no-adapter", is_flag=True, help="FILE has no adapter, though the checkpoint has one.")
@click.option("--adapter-gguf", type=_PATH, help="A separate adapter file that belongs to FILE.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    help="GGUF: reference, llama.cpp, native. ONNX: onnxruntime, onnxruntime+irq, genai, genai+irq. "
    "Repeatable, or with commas (default: all that are installed).",
)
@click.option("--text", type=_PATH, help="UTF-8 text to evaluate on (default: a passage of our own).")
@click.option("--positions", default=256, show_default=True, type=click.IntRange(2), help="Tokens of it.")
@click.option("--greedy", default=64, show_default=True, type=click.IntRange(0), help="Tokens to generate.")
@click.option(
    "--scale",
    "adapter_scale",
    default=1.0,
    show_default=True,
    help="Adapter scale in the runtimes; 1 alone passes.",
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Compute threads.")
@click.option("--report", type=_PATH, help="Write the JSON report here too.")
@click.option("--junit", type=_PATH, help="Write JUnit XML here.")
@click.option("--html", type=_PATH, help="Write a page with plots here; it loads nothing.")
@click.option("--baseline", type=_PATH, help="An earlier JSON report: fail if a figure of it has got worse.")
@json_option
@verb
def command(
    file: Path,
    against: Path,
    adapters: tuple[Path, ...],
    no_adapter: bool,
    adapter_gguf: Path | None,
    runtimes: tuple[str, ...],
    text: Path | None,
    positions: int,
    greedy: int,
    adapter_scale: float,
    threads: int,
    report: Path | None,
    junit: Path | None,
    html: Path | None,
    baseline: Path | None,
    as_json: bool,
) -> None:
    """Prove that FILE computes what the checkpoint computes.

    FILE is a GGUF file, the directory of a stock pair, or the directory of an ONNX export.
    Exit code 0 if every gate holds, 4 if not.
    """
    from irq_export.parity.baseline import compare_with_baseline, read_baseline
    from irq_export.parity.html import to_html
    from irq_export.parity.verify import verify

    earlier = None if baseline is None else read_baseline(baseline)
    for path in (report, junit, html):
        if path is not None:
            check_file_target(path, overwrite=True)
    with progress("verify") as update:
        found = verify(
            file,
            against=against,
            adapter=adapters or None,
            no_adapter=no_adapter,
            adapter_gguf=adapter_gguf,
            runtimes=runtimes or None,
            text=text,
            positions=positions,
            greedy=greedy,
            adapter_scale=adapter_scale,
            threads=threads,
            progress=update,
        )
    if earlier is not None:
        found = compare_with_baseline(found, earlier)
    for path, form in ((report, found.to_json), (junit, found.to_junit), (html, partial(to_html, found))):
        if path is not None:
            with atomic_file(path, overwrite=True) as stream:
                stream.write(form().encode())
    click.echo(found.to_json() if as_json else found.to_text())
    if not found.passed:
        sys.exit(ParityFailed.exit_code)
