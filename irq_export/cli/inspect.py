"""``irq-export inspect``: what a GGUF file or a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import click

from irq_export.cli.common import emit, json_option, verb

__all__ = ["command"]


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@verb
def command(path: Path, as_json: bool) -> None:
    """Show what PATH holds: a GGUF file, the directory of a stock pair, or a checkpoint."""
    from irq_export.inspect import inspect

    summaries = inspect(path)
    text = "\n\n".join(summary.to_text() for summary in summaries)
    emit({"items": [summary.to_dict() for summary in summaries]}, text, as_json=as_json)
