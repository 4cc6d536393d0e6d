"""Which files a path means: a GGUF file, or the directory of a stock pair (spec/irq-gguf.md, section 5)."""

from __future__ import annotations

from pathlib import Path

from irq_formats.errors import MalformedFile, UsageError

__all__ = ["ADAPTER_NAME", "BASE_NAME", "model_files"]

BASE_NAME = "base.gguf"
ADAPTER_NAME = "adapter.gguf"


def model_files(path: str | Path, adapter: str | Path | None = None) -> tuple[Path, Path | None]:
    """Return the model file and the adapter file that are meant.

    Args:
        path: A file, or the directory of a stock pair.
        adapter: A separate adapter file, for a model that has none.

    Raises:
        UsageError: There is nothing at ``path``, or the pair has its own adapter.
        MalformedFile: A directory is no stock pair.
    """
    model, given = Path(path), None if adapter is None else Path(adapter)
    if not model.exists():
        raise UsageError("no such file or directory", where=model)
    if not model.is_dir():
        return model, given
    base, beside = model / BASE_NAME, model / ADAPTER_NAME
    if not base.is_file():
        raise MalformedFile(
            f"no {BASE_NAME} in it",
            where=model,
            expected="a GGUF file, or the directory of a stock pair",
            hint="A checkpoint becomes one with: irq-export to-gguf CHECKPOINT -o FILE"
            if (model / "config.json").is_file()
            else None,
        )
    if not beside.is_file():
        return base, given
    if given is not None:
        raise UsageError(
            "the pair has an adapter of its own, which carries the offsets of its base",
            where=model,
            got=given,
            hint="Leave the other adapter out",
        )
    return base, beside
