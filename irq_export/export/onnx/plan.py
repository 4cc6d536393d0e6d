"""What an ONNX export is going to write: tensors, bytes, memory, and proof that nothing is forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from irq_export.export.gguf.plan import check_used_once, skip_lines
from irq_export.export.gguf.tensors import block_origins
from irq_export.export.onnx.adapters import NamedAdapter
from irq_export.export.onnx.weights import ExportTensor
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UsageError
from irq_formats.onnx.data_file import data_offsets
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME
from irq_formats.preflight import check_dir_target, check_room

__all__ = ["OnnxPlan", "check_complete", "preflight"]

#: The interpreter with numpy, onnx, onnx-ir and a graph (measured: 130 MB).
_PROCESS_BYTES = 192 << 20
#: Manifest, adapter headers and directory blocks, bytes.
_DISK_MARGIN_BYTES = 1 << 20
_TYPES = {"float32": "F32", "float16": "F16", "uint8": "U8"}


@dataclass(frozen=True)
class OnnxPlan:
    """A whole export.

    Attributes:
        profile: ``irq`` or ``stock``.
        output: The directory.
        graph_bytes: Bytes of ``model.onnx``.
        tensors: The tensors of the data file, in order.
        adapters: Adapters that become files of their own.
        companions: Bytes of the files copied beside the model, by name.
        quantized_weights: Weights of block-quantised matrices.
        skipped: Source tensors left out, with the reason.
        notes: What the user should know.
    """

    profile: str
    output: Path
    graph_bytes: int
    tensors: Sequence[ExportTensor]
    adapters: Sequence[NamedAdapter]
    companions: Mapping[str, int]
    quantized_weights: int
    skipped: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def data_bytes(self) -> int:
        """Bytes of the data file."""
        return data_offsets(tensor.data for tensor in self.tensors)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, which is also the peak of disk use."""
        adapters = sum(_adapter_bytes(adapter) for adapter in self.adapters)
        return self.graph_bytes + self.data_bytes + adapters + sum(self.companions.values())

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory at the peak: the process, the adapters and the largest tensor in work."""
        adapters = sum(_adapter_bytes(adapter) for adapter in self.adapters)
        return _PROCESS_BYTES + 2 * adapters + max(tensor.work_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the block-quantised matrices, scales and tau included."""
        nbytes = sum(tensor.data.nbytes for tensor in self.tensors if tensor.is_block)
        return 8 * nbytes / self.quantized_weights if self.quantized_weights else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the plan for ``--json`` (schema ``formats/schema/plan.schema.json``)."""
        data = [
            {
                "name": tensor.data.name,
                "type": _TYPES[tensor.data.dtype],
                "shape": list(tensor.data.shape),
                "bytes": tensor.data.nbytes,
            }
            for tensor in self.tensors
        ]
        files: list[dict[str, object]] = [
            {"path": str(self.output / MODEL_NAME), "bytes": self.graph_bytes, "tensors": []},
            {"path": str(self.output / DATA_NAME), "bytes": self.data_bytes, "tensors": data},
        ]
        for adapter in self.adapters:
            path, parameters = self.output / adapter.file_name, adapter.parameters.items()
            tensors = [
                {"name": name, "type": _TYPES[a.dtype.name], "shape": list(a.shape), "bytes": a.nbytes}
                for name, a in parameters
            ]
            files.append({"path": str(path), "bytes": _adapter_bytes(adapter), "tensors": tensors})
        return {
            "profile": self.profile,
            "output": str(self.output),
            "files": files,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "peak_disk_bytes": self.nbytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the plan for people."""
        kinds, sizes = Counter[str](), Counter[str]()
        for tensor in self.tensors:
            kinds[_TYPES[tensor.data.dtype]] += 1
            sizes[_TYPES[tensor.data.dtype]] += tensor.data.nbytes
        lines = [f"{self.output / MODEL_NAME}: {self.graph_bytes:,} bytes"]
        lines.append(f"{self.output / DATA_NAME}: {len(self.tensors)} tensors, {self.data_bytes:,} bytes")
        lines += [f"  {kind:5} {kinds[kind]:5} tensors {size:>15,} bytes" for kind, size in sizes.items()]
        lines += [
            f"{self.output / one.file_name}: {len(one.pairs)} layers, {_adapter_bytes(one):,} bytes"
            for one in self.adapters
        ]
        lines.append(f"quantised matrices: {self.bits_per_weight:.4f} bits per weight")
        lines.append(
            f"peak disk {self.nbytes / 1e6:,.1f} MB, peak memory about {self.peak_memory_bytes / 1e6:,.0f} MB"
        )
        lines += skip_lines(self.skipped)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _adapter_bytes(adapter: NamedAdapter) -> int:
    """Bytes of an adapter file, but for its table of contents (some 100 bytes a tensor)."""
    return sum(array.nbytes for array in adapter.parameters.values())


def check_complete(plan: OnnxPlan, checkpoint: Checkpoint, adapters: Iterable[NamedAdapter]) -> None:
    """Check that every source tensor is used exactly once or named as skipped.

    Args:
        plan: What would be written.
        checkpoint: The source.
        adapters: All adapters that were opened.

    Raises:
        IrqError: One is not; that is a bug of the exporter, and nothing has been written.
    """
    expected = {*checkpoint.plain}
    for module in checkpoint.blocks:
        expected |= {*block_origins(checkpoint, module)}
    for adapter in adapters:
        expected |= {*adapter.origins}
    used = Counter(origin for tensor in plan.tensors for origin in tensor.origins)
    used.update(origin for adapter in plan.adapters for origin in adapter.origins)
    check_used_once(expected, used, plan.skipped)


def preflight(plan: OnnxPlan, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an export that cannot finish, before anything is written.

    Args:
        plan: What would be written.
        inputs: Directories that are read.
        overwrite: Whether an existing output may be replaced.

    Raises:
        OutputExists: The output is there and ``overwrite`` is false, or must not be replaced.
        UsageError: An input would be overwritten.
        PreflightRefused: The disk has less room than the files need.
    """
    target = plan.output.resolve()
    for directory in inputs:
        source = directory.resolve()
        if source.is_relative_to(target) or (target.is_relative_to(source) and target.exists()):
            raise UsageError("the output would overwrite the input", where=target, got=directory)
    check_dir_target(plan.output, overwrite=overwrite)
    check_room(plan.output, plan.nbytes + _DISK_MARGIN_BYTES)
