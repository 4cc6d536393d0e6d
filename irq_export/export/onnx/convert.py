"""From a checkpoint to ONNX: plan, preflight, stream, read back, rename."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_export.export.gguf.plan import skip_lines
from irq_export.export.onnx.adapters import NamedAdapter, open_adapters, write_adapter_file
from irq_export.export.onnx.companions import COMPANIONS, copied_files
from irq_export.export.onnx.network import Network, build_network
from irq_export.export.onnx.options import OnnxOptions
from irq_export.export.onnx.plan import OnnxPlan, check_complete, preflight
from irq_export.export.onnx.readback import ReadBack, compare_graph, read_back
from irq_export.export.rejected import set_aside
from irq_formats.atomic import atomic_dir
from irq_formats.checkpoint import Checkpoint, open_checkpoint
from irq_formats.errors import MalformedFile, ParityFailed, UsageError
from irq_formats.manifest import write_manifest
from irq_formats.onnx.data_file import data_offsets, write_data
from irq_formats.onnx.model_file import DATA_NAME, FORMAT_VERSION, MODEL_NAME, open_model
from irq_runtime.onnx import library_path

__all__ = ["OnnxResult", "manifest_extra", "plan_onnx", "to_onnx"]

#: Called with (bytes done, bytes in all, name of the tensor written).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class OnnxResult:
    """What an export did.

    Attributes:
        profile: ``irq`` or ``stock``.
        output: The directory.
        files: Bytes of every file in it, by name.
        bits_per_weight: Of the block-quantised matrices, scales and tau included.
        read_back: What was compared with the checkpoint after writing.
        skipped: Source tensors left out, with the reason.
        notes: What the user should know.
    """

    profile: str
    output: Path
    files: dict[str, int]
    bits_per_weight: float
    read_back: ReadBack
    skipped: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the result for ``--json``."""
        return {
            "profile": self.profile,
            "output": str(self.output),
            "files": [{"path": str(self.output / name), "bytes": size} for name, size in self.files.items()],
            "bits_per_weight": round(self.bits_per_weight, 4),
            "read_back": asdict(self.read_back),
            "skipped": self.skipped,
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the result for people."""
        lines = [f"{self.output / name}  {size:,} bytes" for name, size in self.files.items()]
        lines.append(f"quantised matrices: {self.bits_per_weight:.4f} bits per weight")
        lines.append(f"read back: {self.read_back.exact} tensors bit-exact")
        if self.read_back.rounded:
            lines[-1] += f", {self.read_back.rounded} rounded to float16"
        lines += skip_lines(self.skipped)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def plan_onnx(checkpoint: str | Path, output: str | Path, **options: Any) -> OnnxPlan:
    """Return what :func:`to_onnx` with the same arguments would write; write nothing.

    Args:
        checkpoint: As for :func:`to_onnx`.
        output: As for :func:`to_onnx`.
        **options: The fields of :class:`~irq_export.export.onnx.options.OnnxOptions`.

    Raises:
        IrqError: As :func:`to_onnx`, but for its output and the disk.
    """
    return _Export.open(checkpoint, Path(output), OnnxOptions(**options)).plan


def to_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    profile: str = "irq",
    attention: str = "gqa",
    dtype: str = "f32",
    adapters: Sequence[str | Path] = (),
    bake_adapter: bool = False,
    adapter_slots: bool = True,
    int_bits: str = "4",
    context: int | None = None,
    library: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OnnxResult:
    """Write a checkpoint as an ONNX model and prove that the files hold it.

    Args:
        checkpoint: Directory that ``quantize`` or training wrote.
        output: The directory to write.
        profile: ``irq`` (operators of our domain with function bodies) or ``stock`` (the bodies alone).
        attention: ``gqa`` (onnxruntime's GroupQueryAttention) or ``standard`` (plain ONNX operators), of
            the attention alone.
        dtype: ``f32`` or ``f16``.
        adapters: PEFT directories, each written as ``NAME.onnx_adapter``; none takes the checkpoint's own.
        bake_adapter: Put the one adapter into the model, as side branches.
        adapter_slots: Give every linear layer inputs for an adapter.
        int_bits: ``4`` carries int3 and int2 in 4-bit integers, ``own`` keeps their bits.
        context: Positions to export for; None takes those the model was made for.
        library: Put our library, built for this machine, beside the model: onnxruntime-genai loads it.
        overwrite: Replace an existing output.
        progress: Called after each tensor.

    Raises:
        UsageError: The arguments contradict each other.
        MalformedFile: Checkpoint or adapter break their specification.
        UnsupportedModel: The graph cannot hold this model.
        WrongBase: An adapter was trained against another base.
        PreflightRefused: The disk has not enough room.
        OutputExists: The output exists and ``overwrite`` is false.
        ParityFailed: What was written is not the checkpoint; it was kept as ``*.rejected``.
    """
    options = OnnxOptions(
        profile=profile,
        attention=attention,
        dtype=dtype,
        adapters=tuple(adapters),
        bake_adapter=bake_adapter,
        adapter_slots=adapter_slots,
        int_bits=int_bits,
        context=context,
        library=library,
    )
    export = _Export.open(checkpoint, Path(output), options)
    preflight(export.plan, export.inputs, overwrite=overwrite)
    return export.write(overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class _Export:
    """An export under way: the opened inputs, the graph, and the plan made from them."""

    checkpoint: Checkpoint
    options: OnnxOptions
    adapters: list[NamedAdapter]
    network: Network
    graph: bytes
    plan: OnnxPlan

    @classmethod
    def open(cls, checkpoint_dir: str | Path, output: Path, options: OnnxOptions) -> _Export:
        """Open and check the inputs, build the graph, plan."""
        checkpoint = open_checkpoint(checkpoint_dir)
        adapters = open_adapters(checkpoint, options)
        if options.bake_adapter and not adapters:
            raise UsageError("there is no adapter to bake in", where=checkpoint.path)
        baked = adapters[0].pairs if options.bake_adapter else {}
        network = build_network(checkpoint, options, baked=baked)
        notes = [
            f"adapter {adapter.name} records no base hash: that it fits this base was not checked"
            for adapter in adapters
            if adapter.base_hash is None
        ]
        if unlisted := checkpoint.unlisted_files:
            notes.append(f"not in the checkpoint's manifest, so taken unchecked: {', '.join(unlisted)}")
        graph = network.proto.SerializeToString(deterministic=True)
        plan = OnnxPlan(
            profile=options.profile,
            output=output,
            graph_bytes=len(graph),
            tensors=tuple(network.tensors.values()),
            adapters=() if options.bake_adapter else tuple(adapters),
            companions={file.name: file.stat().st_size for file in _companions(checkpoint, options)},
            quantized_weights=sum(block.shape[0] * block.shape[1] for block in checkpoint.blocks.values()),
            skipped={},
            notes=tuple(notes),
        )
        check_complete(plan, checkpoint, adapters)
        return cls(checkpoint, options, adapters, network, graph, plan)

    @property
    def inputs(self) -> list[Path]:
        """The directories that are read."""
        return [self.checkpoint.path, *(Path(path) for path in self.options.adapters)]

    def write(self, *, overwrite: bool, progress: Progress | None) -> OnnxResult:
        """Write all files; the directory appears under its name only when it is complete and compared."""
        plan = self.plan
        with atomic_dir(plan.output, overwrite=overwrite) as directory:
            self._write_files(directory, progress)
            compared = self._read_back(directory)
        return OnnxResult(
            profile=plan.profile,
            output=plan.output,
            files={file.name: file.stat().st_size for file in sorted(plan.output.iterdir())},
            bits_per_weight=plan.bits_per_weight,
            read_back=compared,
            skipped=dict(plan.skipped),
            notes=plan.notes,
        )

    def _write_files(self, directory: Path, progress: Progress | None) -> None:
        data = [tensor.data for tensor in self.plan.tensors]
        offsets, total = data_offsets(data)
        (directory / MODEL_NAME).write_bytes(self.graph)
        with (directory / DATA_NAME).open("xb", buffering=1 << 20) as file:
            write_data(file, data, offsets, progress=progress, total=total)
        for adapter in self.plan.adapters:
            write_adapter_file(directory / adapter.file_name, adapter)
        for write in COMPANIONS:
            write(directory, self.checkpoint, self.options)
        write_manifest(directory, manifest_extra(self.checkpoint, self.options, self.adapters))

    def _read_back(self, directory: Path) -> ReadBack:
        """Compare the files with the checkpoint; put them aside if they are not it."""
        baked = self.adapters[0] if self.options.bake_adapter else None
        try:
            model = open_model(directory)
            compare_graph(model, self.network)
            return read_back(model, self.checkpoint, self.network, self.plan.adapters, baked)
        except (ParityFailed, MalformedFile) as error:
            rejected = set_aside(directory, self.plan.output)
            raise ParityFailed("what was written is not the checkpoint", where=rejected, got=error) from error


def _companions(checkpoint: Checkpoint, options: OnnxOptions) -> list[Path]:
    return [*copied_files(checkpoint.path), *([library_path()] if options.library else [])]


def manifest_extra(
    checkpoint: Checkpoint, options: OnnxOptions, adapters: Sequence[NamedAdapter]
) -> dict[str, object]:
    """Return what the manifest says beside the files."""
    return {
        "kind": "irq-onnx",
        "version": int(FORMAT_VERSION),
        "base_hash": checkpoint.base_hash,
        "profile": options.profile,
        "adapters": {adapter.name: {"base_hash": adapter.base_hash} for adapter in adapters},
    }
