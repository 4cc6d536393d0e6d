"""What is being verified: the files of an export and how exactly they can hold the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from irq_formats.errors import MalformedFile, UsageError
from irq_formats.gguf.reader import GgufFile, open_gguf

__all__ = ["Target", "open_target"]


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


def open_target(path: Path, adapter: Path | None = None) -> Target:
    """Open an export: a GGUF file, or the directory of a stock pair.

    Args:
        path: File or directory.
        adapter: A separate adapter GGUF, for a single file.

    Raises:
        UsageError: There is nothing at ``path``.
        MalformedFile: It is neither a GGUF file nor a directory with base.gguf in it.
    """
    if not path.exists():
        raise UsageError("no such file or directory", where=path)
    if path.is_dir():
        model = path / "base.gguf"
        if not model.is_file():
            raise MalformedFile("no base.gguf in the directory of a stock pair", where=path)
        beside = path / "adapter.gguf"
        return Target("pair", model, beside if beside.is_file() else adapter, open_gguf(model))
    gguf = open_gguf(path)
    own = gguf.metadata.get("general.architecture") == "irq"
    return Target("irq" if own else "pair" if adapter else "merged", path, adapter, gguf)
