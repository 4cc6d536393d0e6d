"""``irq-export calibrate``: what each input of every linear carries, for ``quantize --importance``."""

from __future__ import annotations

from pathlib import Path

import click

from irq_export.cli.common import emit, force_option, json_option, progress, verb

__all__ = ["command"]


@click.command(name="calibrate")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write (safetensors)."
)
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Windows to read.")
@click.option("--context", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a window.")
@click.option("--device", default="cpu", show_default=True, help="Where to run: cpu, cuda, cuda:1.")
@force_option
@json_option
@verb
def command(
    model_dir: Path,
    text: Path,
    output: Path,
    windows: int,
    context: int,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure on a text what each input of every linear of a model carries.

    MODEL_DIR is a Hugging Face directory that is not quantised, TEXT a UTF-8 file of the kind the model is
    for. The result goes to `quantize --importance`.
    """
    from irq_export.calibrate import calibrate

    with progress("calibrate") as update:
        report = calibrate(
            model_dir,
            text,
            output,
            windows=windows,
            context=context,
            device=device,
            overwrite=overwrite,
            progress=update,
        )
    lines = [
        f"{report.layers} linears over {report.tokens:,} tokens (perplexity {report.perplexity:.2f})",
        f"wrote {report.output}",
    ]
    emit({"calibrate": report.to_dict()}, "\n".join(lines), as_json=as_json)
