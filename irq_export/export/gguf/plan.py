"""What an export is going to write: tensors, bytes, memory, and proof that nothing is forgotten.

A plan is made from headers alone. It is what ``--dry-run`` prints and what the writer carries out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from irq_export.export.gguf.tensors import ExportTensor
from irq_formats.errors import IrqError, UsageError
from irq_formats.gguf import GgufValue, file_bytes
from irq_formats.preflight import check_dir_target, check_file_target, check_room

__all__ = ["Plan", "PlannedFile", "check_complete", "check_used_once", "preflight", "skip_lines"]

#: The interpreter with numpy, the tokenizer and the strict reader, bytes (measured: 90 MB).
_PROCESS_BYTES = 128 << 20
#: Manifest, Modelfile and directory blocks, bytes.
_DISK_MARGIN_BYTES = 1 << 20


@dataclass(frozen=True)
class PlannedFile:
    """One GGUF file.

    Attributes:
        name: File name.
        metadata: Its keys, in order.
        tensors: Its tensors, in order.
    """

    name: str
    metadata: Mapping[str, GgufValue]
    tensors: tuple[ExportTensor, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the finished file."""
        return file_bytes(self.metadata, [tensor.source for tensor in self.tensors])


@dataclass(frozen=True)
class Plan:
    """A whole export.

    Attributes:
        profile: ``irq``, ``stock`` or ``merge-TYPE``.
        output: Final path: a file, or the directory of a stock pair.
        files: What is written, in order; the model file is the last one of single-file profiles.
        is_directory: Whether ``output`` becomes a directory.
        quantized_weights: Weights of block-quantised matrices.
        skipped: Source tensors left out, with the reason.
        notes: What the user should know.
    """

    profile: str
    output: Path
    files: tuple[PlannedFile, ...]
    is_directory: bool
    quantized_weights: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[ExportTensor]:
        """All tensors of all files."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, which is also the peak of disk use: nothing else is written."""
        return sum(file.nbytes for file in self.files)

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory at the peak: the process, the headers and the largest tensor."""
        return _PROCESS_BYTES + max(tensor.work_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the block-quantised matrices, tau included, adapter not."""
        nbytes = sum(tensor.quantized_bytes for tensor in self.tensors)
        return 8 * nbytes / self.quantized_weights if self.quantized_weights else 0.0

    def path(self, file: PlannedFile) -> Path:
        """Return where a file ends up."""
        return self.output / file.name if self.is_directory else self.output.parent / file.name

    def to_dict(self) -> dict[str, object]:
        """Return the plan for ``--json`` (schema ``formats/schema/plan.schema.json``)."""
        return {
            "profile": self.profile,
            "output": str(self.output),
            "files": [
                {
                    "path": str(self.path(file)),
                    "bytes": file.nbytes,
                    "tensors": [
                        {
                            "name": tensor.source.name,
                            "type": tensor.source.type.name,
                            "shape": list(tensor.source.shape),
                            "bytes": tensor.nbytes,
                        }
                        for tensor in file.tensors
                    ],
                }
                for file in self.files
            ],
            "bits_per_weight": round(self.bits_per_weight, 4),
            "peak_disk_bytes": self.nbytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the plan for people."""
        lines = []
        for file in self.files:
            lines.append(f"{self.path(file)}: {len(file.tensors)} tensors, {file.nbytes:,} bytes")
            kinds = Counter(tensor.source.type.name for tensor in file.tensors)
            sizes = Counter[str]()
            for tensor in file.tensors:
                sizes[tensor.source.type.name] += tensor.nbytes
            lines += [f"  {kind:5} {kinds[kind]:5} tensors {size:>15,} bytes" for kind, size in sizes.items()]
        lines.append(f"quantised matrices: {self.bits_per_weight:.4f} bits per weight")
        lines.append(
            f"peak disk {self.nbytes / 1e6:,.1f} MB, peak memory about {self.peak_memory_bytes / 1e6:,.0f} MB"
        )
        lines += skip_lines(self.skipped)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def skip_lines(skipped: Mapping[str, str]) -> list[str]:
    """Return one line per reason, with the names of what was left out."""
    reasons = dict.fromkeys(skipped.values())
    names = {why: [name for name, reason in skipped.items() if reason == why] for why in reasons}
    return [f"skipped {len(names[why])} tensors ({why}): {', '.join(names[why])}" for why in reasons]


def check_complete(plan: Plan, source_tensors: Iterable[str]) -> None:
    """Check that every source tensor is used exactly once or named as skipped.

    Raises:
        IrqError: One is not; that is a bug of the exporter, and nothing has been written.
    """
    used = Counter(origin for tensor in plan.tensors for origin in tensor.origins)
    check_used_once(set(source_tensors), used, plan.skipped)


def check_used_once(expected: set[str], used: Counter[str], skipped: Mapping[str, str]) -> None:
    """Check that all that is expected, and nothing else, is used once or skipped.

    Raises:
        IrqError: It is not; that is a bug of the exporter.
    """
    wrong = [
        name
        for name in sorted(expected | used.keys() | skipped.keys())
        if name not in expected or used[name] + (name in skipped) != 1
    ]
    if wrong:
        raise IrqError(
            "source tensors are not used exactly once",
            expected="1 each",
            got=", ".join(f"{name}: {used[name]}" for name in wrong[:5]),
            hint="Please report this bug",
        )


def preflight(plan: Plan, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an export that cannot finish, before anything is written.

    Args:
        plan: What would be written.
        inputs: Directories that are read.
        overwrite: Whether existing outputs may be replaced.

    Raises:
        OutputExists: An output is there and ``overwrite`` is false, or must not be replaced.
        UsageError: The output has no name, or an input would be overwritten.
        PreflightRefused: The disk has less room than the files need.
    """
    outputs = [plan.output] if plan.is_directory else [plan.path(file) for file in plan.files]
    for directory in inputs:
        source = directory.resolve()
        for path in (path.resolve() for path in outputs):
            if source.is_relative_to(path) or (path.is_relative_to(source) and path.exists()):
                raise UsageError("the output would overwrite the input", where=path, got=directory)
    for path in outputs:
        check = check_dir_target if plan.is_directory else check_file_target
        check(path, overwrite=overwrite)
    check_room(plan.output, plan.nbytes + _DISK_MARGIN_BYTES)
