"""``irq-export quantize``: a Hugging Face model becomes a 2-4 bit checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irq_export.cli.common import emit, force_option, json_option, progress, verb

__all__ = ["command"]


@click.command(name="quantize")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "output_dir", type=click.Path(path_type=Path), help="The checkpoint to write."
)
@click.option(
    "--codebook",
    type=click.Choice(["nf4", "nf3", "nf2", "int4", "int3", "int2"]),
    default="nf4",
    show_default=True,
)
@click.option("--block-size", type=click.Choice(["64", "32"]), default="64", show_default=True)
@click.option(
    "--icq/--no-icq",
    default=None,
    help="Search an offset per block for the entropy of the codes, or start from the absolute maximum; "
    "--no-icq --refine none --tau none is plain QLoRA.  [default: --icq for every codebook but nf4, where it "
    "does not pay; for nf4 too with --objective mse or --tie first]",
)
@click.option(
    "--objective",
    type=click.Choice(["entropy", "mse"]),
    default="entropy",
    show_default=True,
    help="What the searched offset maximises (entropy of the codes) or minimises (squared error).",
)
@click.option(
    "--tie",
    type=click.Choice(["mse", "first"]),
    default="mse",
    show_default=True,
    help="Among offsets of equal entropy: the least squared error, or the released code's choice.",
)
@click.option(
    "--refine",
    type=click.Choice(["ls", "none"]),
    default="ls",
    show_default=True,
    help="Refit scale and offset by least squares after the search; none is the paper.",
)
@click.option(
    "--numerics",
    type=click.Choice(["exact", "reference"]),
    default="exact",
    show_default=True,
    help="reference: the released code's arithmetic, bit for bit (with --tie first --refine none and "
    "--scale-rounding none).",
)
@click.option(
    "--scale",
    type=click.Choice(["dq8", "f16", "f32"]),
    default="dq8",
    show_default=True,
    help="Storage of scales.",
)
@click.option(
    "--tau",
    type=click.Choice(["dq8", "f16", "f32", "none"]),
    default="dq8",
    show_default=True,
    help="Storage of offsets.",
)
@click.option(
    "--scale-rounding",
    type=click.Choice(["fp16", "none"]),
    default="fp16",
    show_default=True,
    help="Round expanded dq8 scales to fp16, which every export holds exactly.",
)
@click.option(
    "--embedding", type=click.Choice(["int8"]), help="Quantise embedding and head to int8 (Q8_0) as well."
)
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Quantise only linears that match (repeatable)."
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Keep linears that match as they are (repeatable)."
)
@click.option(
    "--importance",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of irq-export calibrate: fit scale and offset to what each input carries, instead of a search.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--dry-run", is_flag=True, help="Show what would be done with every tensor, and write nothing.")
@force_option
@json_option
@verb
def command(
    model_dir: Path,
    output_dir: Path | None,
    dry_run: bool,
    as_json: bool,
    icq: bool | None,
    block_size: str,
    **options: Any,
) -> None:
    """Quantise a Hugging Face model to 2-4 bits.

    MODEL_DIR is a Llama-family directory with safetensors weights. The linear layers are quantised; every
    other tensor keeps its own dtype, bit for bit. Tokenizer and chat template are copied.
    """
    if dry_run:
        _show_plan(model_dir, int(block_size), icq, options, as_json=as_json)
        return
    if output_dir is None:
        raise click.UsageError("Missing option '-o' / '--output' (or use --dry-run).")
    from irq_export.quantize_model import quantize

    with progress("quantize") as update:
        report = quantize(
            model_dir, output_dir, icq=icq, block_size=int(block_size), progress=update, **options
        )
    lines = _skipped_lines(report.skipped)
    for codebook in dict.fromkeys(tensor.codebook for tensor in report.tensors):
        chosen = [tensor for tensor in report.tensors if tensor.codebook == codebook]
        worst = max(chosen, key=lambda tensor: tensor.rel_mse)
        lines.append(
            f"{codebook}: {len(chosen)} tensors, {report.bits_per_weight(codebook):.4f} bits per weight, "
            f"relative squared error at most {worst.rel_mse:.3g} ({worst.name})"
        )
        if worst.entropy_before is not None:
            lines.append(f"  entropy of the codes: {_entropies(chosen)}")
    lines.append(f"base hash {report.base_hash}")
    lines.append(f"wrote {report.output}: {report.output_bytes:,} bytes in {report.seconds:.1f} s")
    emit({"quantize": report.to_dict()}, "\n".join(lines), as_json=as_json)


def _entropies(tensors: list[Any]) -> str:
    """Mean entropy of the tensors, of plain codes and of those that are stored."""
    before, after = (
        sum(getattr(tensor, name) for tensor in tensors) / len(tensors)
        for name in ("entropy_before", "entropy_after")
    )
    return f"{before:.4f} bits of plain codes, {after:.4f} of these"


def _skipped_lines(skipped: dict[str, str]) -> list[str]:
    return [f"not quantised: {name}: {reason}" for name, reason in skipped.items()]


def _show_plan(
    model_dir: Path, block_size: int, icq: bool | None, options: dict[str, Any], *, as_json: bool
) -> None:
    from irq_export.icq import SearchConfig, check_settings
    from irq_export.quantize_plan import plan_quantization
    from irq_formats.blocks import BlockSpec

    names = ("codebook", "scale", "tau", "scale_rounding")
    spec = BlockSpec(block_size=block_size, **{name: options[name] for name in names})
    search = ("objective", "tie", "refine", "numerics")
    chosen = {name: options[name] for name in search}
    check_settings(spec, SearchConfig.for_codebook(spec.codebook, icq=icq, **chosen))
    plan = plan_quantization(
        model_dir, spec, **{name: options[name] for name in ("embedding", "include", "exclude")}
    )
    lines = [
        f"{tensor.ref.name}  {'x'.join(map(str, tensor.ref.shape))}  {tensor.ref.dtype} -> "
        f"{tensor.spec.codebook if tensor.spec else tensor.ref.dtype}  {tensor.nbytes:,} bytes"
        for tensor in plan.tensors
    ]
    lines += _skipped_lines(plan.skipped)
    lines.append(f"{len(plan.tensors)} tensors, {plan.output_bytes:,} bytes (peak disk: the same)")
    emit({"plan": plan.to_dict()}, "\n".join(lines), as_json=as_json)
