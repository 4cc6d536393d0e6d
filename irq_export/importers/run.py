"""``irq-export import``: find out what the source is, and make a checkpoint of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from irq_export.importers.bitsandbytes import check_bnb_config, check_decoding, plan_bnb, read_bnb_tensor
from irq_export.importers.pooled import fold_pooled, is_pooled
from irq_export.importers.released import NEVER_STORED, search_again
from irq_formats.adapter import Adapter, check_base_hash
from irq_formats.atomic import atomic_dir
from irq_formats.checkpoint import Checkpoint, open_checkpoint, read_config
from irq_formats.checkpoint_writer import CheckpointWriter
from irq_formats.companions import companion_files
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.gguf.irq_check import check_adapter_fits
from irq_formats.model import ModelConfig
from irq_formats.names import hf_to_gguf
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter
from irq_formats.preflight import check_dir_target, check_room
from irq_formats.quantization import QUANT_METHOD
from irq_formats.safetensors_io import SafeTensors, open_sharded

__all__ = ["ImportReport", "import_checkpoint"]

Progress = Callable[[int, int, str], None]
_SLACK_BYTES = 16 << 20


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        output: The checkpoint.
        kind: ``bitsandbytes``, ``released`` or ``pooled``.
        base_hash: Of the checkpoint.
        modules: Number of quantised matrices.
        compared: How many of them were read back and compared with bitsandbytes' own decoding.
        skipped: Tensors kept in floating point or left out, with the reason.
        adapter: Number of adapted layers written to ``adapter/``; folded ones count too.
        messages: What the user has to know.
        seconds: Wall time.
    """

    output: Path
    kind: str
    base_hash: str
    modules: int
    compared: int
    skipped: dict[str, str]
    adapter: int
    messages: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Return the report, for JSON."""
        return {**asdict(self), "output": str(self.output), "messages": list(self.messages)}


def import_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    adapter: str | Path | None = None,
    pooling: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Make a checkpoint of a model that another tool quantised, or of an adapter that changes one.

    Args:
        source: A bitsandbytes NF4 directory; a floating-point directory with an ``adapter`` of the released
            IR-QLoRA code; or a checkpoint of ours with a pooled ``adapter``.
        output_dir: The checkpoint, a new directory.
        adapter: PEFT directory; written to ``output_dir/adapter`` with the hash of the new base, or folded.
        pooling: Of a pooled adapter: ``mean`` or ``sum``.
        device: Where to search the base of a released adapter again; default: the CPU.
        overwrite: Replace an existing checkpoint.
        progress: Called with (tensors done, tensors in all, name).

    Raises:
        UnsupportedModel: Another quantisation, FP4, a block size or map that a checkpoint cannot hold.
        UsageError: No model there, or an adapter or option that does not belong to this kind of source.
        MalformedFile: A file breaks its format, or the adapter does not fit the model.
        WrongBase: The adapter was trained against another base.
        ParityFailed: What was written does not decode to bitsandbytes' values; nothing is left behind.
        OutputExists: ``output_dir`` exists and ``overwrite`` is false.
        PreflightRefused: Too little disk space.
    """
    path, output = Path(source), Path(output_dir)
    started = time.monotonic()
    config = read_config(path)
    found = None if adapter is None else read_peft_adapter(adapter)
    if output.resolve() == path.resolve():
        raise UsageError("output and source are the same directory", where=output)
    check_dir_target(output, overwrite=overwrite)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if pooling is not None and method != QUANT_METHOD:
        raise UsageError("only a pooled adapter of a checkpoint has a pooling", where=path, got=pooling)
    if device is not None and quantization is not None:
        raise UsageError("nothing is searched: no device is needed", where=path, got=device)
    if isinstance(quantization, dict) and method == "bitsandbytes":
        check_bnb_config(quantization, path)
        report = _import_bnb(path, output, config, found, overwrite, progress)
    elif method == QUANT_METHOD:
        report = _import_pooled(path, output, found, pooling, overwrite, progress)
    elif quantization is None:
        report = _import_released(path, output, found, device or "cpu", overwrite, progress)
    else:
        raise UnsupportedModel(
            "no importer for this quantisation",
            where=path,
            expected="bitsandbytes NF4",
            got=method,
            hint="Quantise the floating-point weights: irq-export quantize",
        )
    return replace(report, seconds=time.monotonic() - started)


def _import_bnb(
    path: Path,
    output: Path,
    config: dict[str, object],
    adapter: Adapter | None,
    overwrite: bool,
    progress: Progress | None,
) -> ImportReport:
    model = ModelConfig.from_hf(config)
    source = open_sharded(path)
    plan = plan_bnb(model, source, path)
    if adapter is not None:
        if adapter.has_iec:
            raise UsageError(
                "an adapter with elastic connections was trained on a base with offsets: not this one",
                where=path,
                hint="Import it with the floating-point model as SRC",
            )
        _check_adapter(adapter, model, path)
    check_room(output, plan.output_bytes + _SLACK_BYTES)
    total = 2 * len(plan.modules)
    spec = next(iter(plan.modules.values()))
    with atomic_dir(output, overwrite=overwrite) as directory:
        writer = CheckpointWriter(directory)
        for done, (module, module_spec) in enumerate(plan.modules.items()):
            if progress is not None:
                progress(done, total, module)
            writer.add_block(module, read_bnb_tensor(source, module, module_spec, plan.shapes[module]))
        for ref in plan.plain:
            writer.add_plain(ref, partial(source.read, ref.name))
        for companion in companion_files(path):
            writer.copy_file(path, companion)
        rest = {key: value for key, value in config.items() if key != "quantization_config"}
        quantization = writer.finish(
            rest, spec=spec, skipped=plan.skipped, search={"imported_from": "bitsandbytes"}
        )
        _compare(source, open_checkpoint(directory), progress)
        if adapter is not None:
            _write_adapter(directory, adapter, quantization.base_hash)
    return ImportReport(
        output=output,
        kind="bitsandbytes",
        base_hash=quantization.base_hash,
        modules=len(plan.modules),
        compared=len(plan.modules),
        skipped=plan.skipped,
        adapter=0 if adapter is None else len(adapter.layers),
        messages=(),
        seconds=0.0,
    )


def _compare(source: SafeTensors, written: Checkpoint, progress: Progress | None) -> None:
    """Read everything back: blocks against bitsandbytes' decoding, the rest against its bytes."""
    for done, module in enumerate(written.blocks):
        if progress is not None:
            progress(len(written.blocks) + done, 2 * len(written.blocks), f"compare {module}")
        check_decoding(source, module, written.block_tensor(module))
    for name in written.plain:
        if written.plain_raw(name).tobytes() != source.read(name).tobytes():
            raise UnsupportedModel("the source changed while it was read", where=name)


def _check_adapter(adapter: Adapter, model: ModelConfig, where: object) -> None:
    check_adapter_fits({hf_to_gguf(module): layer for module, layer in adapter.layers.items()}, model, where)


def _write_adapter(directory: Path, adapter: Adapter, base_hash: str) -> None:
    """Write the adapter, which from now on belongs to this base alone."""
    check_base_hash(adapter.base_hash, base_hash, "the adapter")
    write_peft_adapter(directory / "adapter", replace(adapter, base_hash=base_hash))


def _import_released(
    path: Path,
    output: Path,
    adapter: Adapter | None,
    device: str,
    overwrite: bool,
    progress: Progress | None,
) -> ImportReport:
    if adapter is None or adapter.meta.get("beta_keys") != "released":
        raise UsageError(
            "the model is in floating point: there is nothing to import",
            where=path,
            expected="--adapter with an adapter of the released IR-QLoRA code",
            hint="Quantise it: irq-export quantize",
        )
    _check_adapter(adapter, ModelConfig.from_hf(read_config(path)), path)
    with atomic_dir(output, overwrite=overwrite) as directory:
        done = search_again(path, directory, device=device, progress=progress)
        _write_adapter(directory, adapter, done.base_hash)
    return ImportReport(
        output=output,
        kind="released",
        base_hash=done.base_hash,
        modules=len(done.tensors),
        compared=0,
        skipped=done.skipped,
        adapter=len(adapter.layers),
        messages=(NEVER_STORED,),
        seconds=0.0,
    )


def _import_pooled(
    path: Path,
    output: Path,
    adapter: Adapter | None,
    pooling: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> ImportReport:
    checkpoint = open_checkpoint(path)
    shapes = {name: module.shape for name, module in checkpoint.blocks.items()}
    if adapter is None or not is_pooled(adapter, shapes):
        raise UsageError(
            "this is a checkpoint already",
            where=path,
            expected="--adapter with a pooled (QA-LoRA) adapter to fold into it",
            hint="Other adapters are exported with it: irq-export to-gguf --adapter-dir",
        )
    check_base_hash(adapter.base_hash, checkpoint.base_hash, "the adapter")
    read = fold_pooled(checkpoint, adapter, pooling or "")
    check_room(output, 2 * sum(file.stat().st_size for file in path.glob("*.safetensors")) + _SLACK_BYTES)
    with atomic_dir(output, overwrite=overwrite) as directory:
        writer = CheckpointWriter(directory)
        for done, module in enumerate(checkpoint.blocks):
            if progress is not None:
                progress(done, len(checkpoint.blocks), module)
            writer.add_block(module, read(module))
        for ref in checkpoint.plain.values():
            writer.add_plain(ref, partial(checkpoint.plain_raw, ref.name))
        for companion in companion_files(path):
            writer.copy_file(path, companion)
        rest = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        old = checkpoint.quantization
        quantization = writer.finish(
            rest,
            spec=replace(old.spec, tau="f32"),
            skipped=old.skipped,
            search={**old.search, "folded_adapter": f"pooled by {pooling}"},
        )
        open_checkpoint(directory)
    return ImportReport(
        output=output,
        kind="pooled",
        base_hash=quantization.base_hash,
        modules=len(checkpoint.blocks),
        compared=0,
        skipped=dict(old.skipped),
        adapter=len(adapter.layers),
        messages=(f"{len(adapter.layers)} layers folded into the offsets, which are float32 now",),
        seconds=0.0,
    )
