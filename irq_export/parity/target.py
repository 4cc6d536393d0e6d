"""What is being verified: the files of an export and how exactly they can hold the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from irq_formats.errors import UsageError
from irq_formats.gguf.irq_payload import ARCHITECTURE
from irq_formats.gguf.pair import matrices_without_offsets, model_files
from irq_formats.gguf.reader import GgufFile, open_gguf

__all__ = ["Target", "is_onnx", "open_target"]


@dataclass(frozen=True)
class Target:
    """An export.

    Attributes:
        kind: ``irq`` (own profile), ``pair`` (stock base and adapter) or ``merged`` (one stock file).
        model: Path of the model file.
        adapter: Path of the adapter file, if there is one beside it.
        gguf: The opened model file.
    """

    kind: str
    model: Path
    adapter: Path | None
    gguf: GgufFile

    @property
    def runs_on_stock(self) -> bool:
        """True if llama.cpp can open it."""
        return self.kind != "irq"

    @property
    def is_half(self) -> bool:
        """True for the base of a pair whose offsets lie in an adapter that is not there."""
        return self.kind == "pair" and self.adapter is None and bool(matrices_without_offsets(self.gguf))


def is_onnx(path: Path) -> bool:
    """Return whether a path is that of an ONNX model, or of a folder with one."""
    return path.suffix == ".onnx" or (path / "model.onnx").exists()


def open_target(path: Path, adapter: Path | None = None) -> Target:
    """Open an export: a GGUF file, or the directory of a stock pair.

    Args:
        path: File or directory.
        adapter: A separate adapter GGUF, for a single file.

    Raises:
        UsageError: There is nothing at ``path``, or it is an adapter.
        MalformedFile: The file breaks its specification, or a directory is no stock pair.
    """
    model, adapter = model_files(path, adapter)
    gguf = open_gguf(model)
    if gguf.metadata.get("general.type") == "adapter":
        raise UsageError("this file is an adapter, not a model", where=path, hint="Give it as --adapter-gguf")
    if gguf.metadata.get("general.architecture") == ARCHITECTURE:
        return Target("irq", model, adapter, gguf)
    is_base = adapter is not None or "irq.stock.codebook" in gguf.metadata
    return Target("pair" if is_base else "merged", model, adapter, gguf)
