"""``irq-export fold-adapter``: an IR-QLoRA adapter as a plain PEFT adapter, exactly."""

from __future__ import annotations

from pathlib import Path

import click

from irq_export.cli.common import emit, force_option, json_option, verb
from irq_export.export.fold_adapter import FoldResult, fold_adapter

__all__ = ["command"]


@click.command("fold-adapter")
@click.argument("adapter_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", "output_dir", required=True, type=click.Path(path_type=Path))
@click.option(
    "--tau-from",
    type=click.Path(path_type=Path),
    help="Checkpoint whose block offsets become extra rank, for a base that stores none.",
)
@click.option(
    "--uniform-rank",
    is_flag=True,
    help="One rank and scaling for all layers, for vLLM and llama.cpp's converter.",
)
@force_option
@json_option
@verb
def command(
    adapter_dir: Path,
    output_dir: Path,
    tau_from: Path | None,
    uniform_rank: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fold the elastic connections of ADAPTER_DIR into A and B; stock PEFT loads the result."""
    result = fold_adapter(
        adapter_dir, output_dir, tau_from=tau_from, uniform_rank=uniform_rank, overwrite=overwrite
    )
    emit(result.to_dict(), _describe(result), as_json=as_json)


def _describe(result: FoldResult) -> str:
    size_mb = result.file_bytes / 1e6
    lines = [
        f"{result.path}: {result.layers} layers, rank up to {result.max_rank}, {size_mb:.1f} MB",
        f"elastic connections folded: {result.folded}; layers with block offsets as rank: {result.with_tau}",
    ]
    if result.with_tau and not result.base_checked:
        lines.append("the adapter records no base hash: that it fits this base was not checked")
    return "\n".join(lines)
