"""``irq-export import``: what another tool quantised becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from irq_export.cli.common import emit, force_option, json_option, progress, verb

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("import")
@click.argument("source", metavar="SRC", type=_PATH)
@click.option("-o", "--output", "output_dir", required=True, type=_PATH, help="The checkpoint to write.")
@click.option("--adapter", type=_PATH, help="PEFT adapter that was trained on SRC.")
@click.option(
    "--pooling", type=click.Choice(["mean", "sum"]), help="Of a QA-LoRA adapter: its files do not say."
)
@click.option(
    "--device",
    help="Where to search the base of a released adapter again: cpu, cuda, cuda:1.  [default: cpu]",
)
@force_option
@json_option
@verb
def command(
    source: Path,
    output_dir: Path,
    adapter: Path | None,
    pooling: str | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn a model that another tool quantised into a checkpoint.

    SRC is a bitsandbytes NF4 directory (moved bit for bit, and compared with bitsandbytes' own decoding); a
    floating-point directory with an --adapter of the released IR-QLoRA code (its base is searched again);
    or a checkpoint with a pooled (QA-LoRA) --adapter, which is folded into the offsets.
    """
    from irq_export.importers.run import import_checkpoint

    with progress("import") as update:
        report = import_checkpoint(
            source,
            output_dir,
            adapter=adapter,
            pooling=pooling,
            device=device,
            overwrite=overwrite,
            progress=update,
        )
    lines = [f"{name}: {reason}" for name, reason in report.skipped.items()]
    lines += [f"note: {message}" for message in report.messages]
    if report.compared:
        lines.append(f"{report.compared} matrices decode to bitsandbytes' values, bit for bit")
    if report.adapter and report.kind != "pooled":
        lines.append(f"adapter: {report.adapter} layers, bound to this base")
    lines.append(f"base hash {report.base_hash}")
    lines.append(f"wrote {report.output}: {report.modules} quantised matrices in {report.seconds:.1f} s")
    emit({"import": report.to_dict()}, "\n".join(lines), as_json=as_json)
