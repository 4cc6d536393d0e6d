"""From a checkpoint to GGUF: plan, preflight, stream, rename, hash, read back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_export.export.gguf.adapters import NO_ADAPTER, export_adapter
from irq_export.export.gguf.irq_profile import irq_files
from irq_export.export.gguf.merged import merged_tensors
from irq_export.export.gguf.modelfile import MODELFILE_NAME, modelfile
from irq_export.export.gguf.options import MERGE_TYPES, GgufOptions
from irq_export.export.gguf.plan import Plan, PlannedFile, check_complete, preflight, skip_lines
from irq_export.export.gguf.readback import ReadBack, read_back
from irq_export.export.gguf.stock_profile import rope_tensors, stock_files, stock_header
from irq_export.export.gguf.tensors import adapter_origins, source_tensors
from irq_export.export.gguf.tokenizer import read_tokenizer
from irq_export.export.rejected import set_aside
from irq_formats.adapter import Adapter
from irq_formats.atomic import atomic_dir, atomic_file
from irq_formats.checkpoint import Checkpoint, open_checkpoint
from irq_formats.errors import MalformedFile, ParityFailed, UsageError
from irq_formats.gguf import GgufValue, write_gguf_into
from irq_formats.gguf.pair import ADAPTER_NAME, BASE_NAME
from irq_formats.manifest import write_manifest

__all__ = ["ExportResult", "OutputFile", "plan_gguf", "to_gguf"]

#: Called with (bytes done, bytes in all, name of the tensor written).
Progress = Callable[[int, int, str], None]

_HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class OutputFile:
    """A finished file.

    Attributes:
        path: Where it is.
        nbytes: Its size.
        sha256: Its hash, hexadecimal.
    """

    path: Path
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        profile: ``irq``, ``stock`` or ``merge-TYPE``.
        output: The file, or the directory of a stock pair.
        files: The GGUF files.
        bits_per_weight: Of the block-quantised matrices, tau included, adapter not.
        read_back: What was compared with the checkpoint after writing.
        skipped: Source tensors left out, with the reason.
        notes: What the user should know.
    """

    profile: str
    output: Path
    files: tuple[OutputFile, ...]
    bits_per_weight: float
    read_back: ReadBack
    skipped: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the result for ``--json``."""
        return {
            "profile": self.profile,
            "output": str(self.output),
            "files": [
                {"path": str(file.path), "bytes": file.nbytes, "sha256": file.sha256} for file in self.files
            ],
            "bits_per_weight": round(self.bits_per_weight, 4),
            "read_back": asdict(self.read_back),
            "skipped": self.skipped,
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the result for people."""
        lines = [f"{file.path}  {file.nbytes:,} bytes  sha256 {file.sha256}" for file in self.files]
        lines.append(f"quantised matrices: {self.bits_per_weight:.4f} bits per weight")
        back = self.read_back
        lines.append(f"read back: {back.exact} tensors bit-exact")
        if back.rounded:
            lines[-1] += f", {back.rounded} rounded as the format asks (weight NMSE {back.weight_nmse:.1e})"
        lines += skip_lines(self.skipped)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def plan_gguf(checkpoint: str | Path, output: str | Path, **options: Any) -> Plan:
    """Return what :func:`to_gguf` with the same arguments would write; write nothing.

    Args:
        checkpoint: As for :func:`to_gguf`.
        output: As for :func:`to_gguf`.
        **options: The fields of :class:`~irq_export.export.gguf.options.GgufOptions`.

    Raises:
        IrqError: As :func:`to_gguf`, but for its output and the disk.
    """
    return _Export.open(checkpoint, Path(output), GgufOptions(**options)).plan


def to_gguf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    profile: str = "irq",
    adapter_dir: str | Path | None = None,
    adapter: str = "keep",
    separate_adapter: bool = False,
    merge: str | None = None,
    int2_type: str | None = None,
    nf_type: str | None = None,
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Pack a checkpoint into GGUF and prove that the files hold it.

    Args:
        checkpoint: Directory that ``quantize`` or training wrote.
        output: The file to write; for profile stock the directory of the pair.
        profile: ``irq`` (our runtime, bit for bit) or ``stock`` (unmodified llama.cpp).
        adapter_dir: PEFT directory of the adapter; None takes the checkpoint's own, if it has one.
        adapter: ``keep``, ``fold``, ``merge`` (needs ``merge``) or ``drop``.
        separate_adapter: Profile irq: write the adapter to ``STEM.adapter.gguf`` beside the model.
        merge: ``f16``, ``bf16`` or ``f32``: one stock file of floating-point weights, adapter merged.
        int2_type: Profile stock, int2: ``auto`` (as None), ``q2_0`` or ``q4_0``.
        nf_type: Profile stock, nf codebooks: ``q8_0`` (as None) or ``bf16``.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if it is not recognised.
        overwrite: Replace an existing output.
        progress: Called after each tensor.

    Raises:
        UsageError: The arguments contradict each other, or do nothing together.
        MalformedFile: Checkpoint or adapter break their specification.
        UnsupportedModel: The profile cannot hold this model.
        WrongBase: The adapter was trained against another base.
        PreflightRefused: The disk has not enough room.
        OutputExists: The output exists and ``overwrite`` is false.
        ParityFailed: What was written is not the checkpoint; it was kept as ``*.rejected``.
    """
    options = GgufOptions(
        profile=profile,
        adapter_dir=adapter_dir,
        adapter=adapter,
        separate_adapter=separate_adapter,
        merge=merge,
        int2_type=int2_type,
        nf_type=nf_type,
        pre_tokenizer=pre_tokenizer,
    )
    export = _Export.open(checkpoint, Path(output), options)
    preflight(export.plan, export.inputs(options), overwrite=overwrite)
    export.write(overwrite=overwrite, progress=progress)
    return export.finish()


@dataclass(frozen=True)
class _Export:
    """An export under way: the opened inputs and the plan made from them."""

    checkpoint: Checkpoint
    adapter: Adapter
    tokenizer: dict[str, GgufValue]
    plan: Plan

    @classmethod
    def open(cls, checkpoint_dir: str | Path, output: Path, options: GgufOptions) -> _Export:
        """Open and check the inputs, and plan."""
        checkpoint = open_checkpoint(checkpoint_dir)
        found = export_adapter(checkpoint, options.adapter_dir, options.adapter)
        used = NO_ADAPTER if options.adapter == "drop" else found
        if options.separate_adapter and not used.layers:
            raise UsageError("there is no adapter to separate", where=checkpoint.path)
        tokenizer = read_tokenizer(
            checkpoint.path,
            checkpoint.model.vocab_size,
            stock=options.is_stock,
            pre_tokenizer=options.pre_tokenizer,
        )
        notes = list(tokenizer.notes)
        if used.layers and used.base_hash is None:
            notes.append("the adapter records no base hash: that it fits this base was not checked")
        if unlisted := checkpoint.unlisted_files:
            notes.append(f"not in the checkpoint's manifest, so taken unchecked: {', '.join(unlisted)}")
        plan = Plan(
            profile=options.profile if options.merge is None else f"merge-{options.merge}",
            output=output,
            files=_planned_files(checkpoint, used, tokenizer.values, output, options),
            is_directory=options.is_pair,
            quantized_weights=sum(block.shape[0] * block.shape[1] for block in checkpoint.blocks.values()),
            skipped=_dropped(found, used),
            notes=tuple(notes),
        )
        check_complete(plan, source_tensors(checkpoint, found))
        return cls(checkpoint, used, tokenizer.values, plan)

    def inputs(self, options: GgufOptions) -> list[Path]:
        """Return the directories that are read."""
        adapter_dir = options.adapter_dir or self.checkpoint.adapter_dir
        return [self.checkpoint.path] + ([] if adapter_dir is None else [Path(adapter_dir)])

    def write(self, *, overwrite: bool, progress: Progress | None) -> None:
        """Write all files; each appears under its final name only when it is complete."""
        if not self.plan.is_directory:
            self._write_files(self.plan.output.parent, overwrite=overwrite, progress=progress)
            return
        with atomic_dir(self.plan.output, overwrite=overwrite) as directory:
            self._write_files(directory, overwrite=False, progress=progress)
            with atomic_file(directory / MODELFILE_NAME) as file:
                file.write(self._modelfile().encode())
            write_manifest(
                directory,
                {"kind": "irq-stock-pair", "base_hash": self.checkpoint.base_hash},
            )

    def _write_files(self, directory: Path, *, overwrite: bool, progress: Progress | None) -> None:
        """Write all files under partial names; when all are complete, they get their own."""
        done, total = 0, self.plan.nbytes
        with ExitStack() as stack:  # what is opened first is renamed last: the model, after its adapter
            paths = [directory / file.name for file in reversed(self.plan.files)]
            opened = [stack.enter_context(atomic_file(path, overwrite=overwrite)) for path in paths]
            for planned, file in zip(self.plan.files, reversed(opened), strict=True):
                update = None if progress is None else _shifted(progress, done, total)
                sources = [tensor.source for tensor in planned.tensors]
                write_gguf_into(file, planned.metadata, sources, progress=update)
                done += planned.nbytes

    def _modelfile(self) -> str:
        names = {file.name for file in self.plan.files}
        template = self.tokenizer.get("tokenizer.chat_template")
        tokens, bos = (self.tokenizer.get(f"tokenizer.ggml.{key}") for key in ("tokens", "bos_token_id"))
        has_bos = tokens is not None and bos is not None
        text = tokens.value[bos.value] if has_bos else ""  # type: ignore[index,union-attr]
        return modelfile(
            BASE_NAME,
            ADAPTER_NAME if ADAPTER_NAME in names else None,
            str(template.value) if template else None,
            str(text),
        )

    def finish(self) -> ExportResult:
        """Read the files back, compare, hash."""
        plan = self.plan
        try:
            compared = read_back(plan, self.checkpoint, self.adapter)
        except MalformedFile as error:
            rejected = _reject(plan)
            raise ParityFailed("what was written is malformed", where=rejected, got=error) from error
        except BaseException:  # Ctrl-C too: what was not compared does not keep its name
            _reject(plan)
            raise
        return ExportResult(
            profile=plan.profile,
            output=plan.output,
            files=tuple(_hashed(plan.path(file)) for file in plan.files),
            bits_per_weight=plan.bits_per_weight,
            read_back=compared,
            skipped=dict(plan.skipped),
            notes=plan.notes,
        )


def _planned_files(
    checkpoint: Checkpoint,
    adapter: Adapter,
    tokenizer: dict[str, GgufValue],
    output: Path,
    options: GgufOptions,
) -> tuple[PlannedFile, ...]:
    if options.merge is not None:
        tensors = rope_tensors(checkpoint.model)
        tensors += merged_tensors(checkpoint, adapter, MERGE_TYPES[options.merge])
        return (PlannedFile(output.name, stock_header(checkpoint.model) | tokenizer, tuple(tensors)),)
    if options.is_pair:
        return stock_files(
            checkpoint,
            adapter,
            tokenizer,
            int2_type=options.int2_type or "auto",
            nf_type=options.nf_type or "q8_0",
        )
    return irq_files(checkpoint, adapter, tokenizer, output, separate_adapter=options.separate_adapter)


def _dropped(found: Adapter, used: Adapter) -> dict[str, str]:
    """Name the adapter tensors that ``drop`` leaves out."""
    return {
        origin: "the adapter is dropped, as asked"
        for module in found.layers
        if module not in used.layers
        for origin in adapter_origins(found, module)
    }


def _shifted(progress: Progress, before: int, total: int) -> Callable[[str, int, int], None]:
    def update(name: str, done: int, of_file: int) -> None:
        progress(before + done, total, name)

    return update


def _reject(plan: Plan) -> Path:
    """Rename what was written; return the new name of the output."""
    paths = [plan.output] if plan.is_directory else [plan.path(file) for file in plan.files]
    return [set_aside(path, path) for path in paths][-1]


def _hashed(path: Path) -> OutputFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return OutputFile(path, path.stat().st_size, digest.hexdigest())
