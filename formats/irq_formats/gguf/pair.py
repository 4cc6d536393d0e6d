"""Stock pairs: which files a path means, and whether two files are one pair (spec/irq-gguf.md, section 5)."""

from __future__ import annotations

from pathlib import Path

from irq_formats.errors import MalformedFile, UsageError, WrongBase
from irq_formats.fields import Fields
from irq_formats.gguf.irq_payload import check_base
from irq_formats.gguf.reader import GgufFile

__all__ = ["ADAPTER_NAME", "BASE_NAME", "check_pair", "matrices_without_offsets", "model_files"]

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


def check_pair(base: GgufFile, adapter: GgufFile | None) -> None:
    """Check that a stock model and a stock adapter compute what was trained, as far as they say.

    Files of others have none of our keys and pass.

    Args:
        base: The model.
        adapter: What is to run with it; None: nothing.

    Raises:
        WrongBase: The files are of two pairs.
        UsageError: The model is one half of a pair, and the other is missing.
        MalformedFile: A key is of the wrong type, or arrays differ in length.
    """
    missing = matrices_without_offsets(base)
    if adapter is None:
        if missing:
            raise UsageError(
                "this file is one half of a pair: the offsets of its blocks lie in the adapter",
                where=base.path,
                hint=f"Give the directory of the pair, or its {ADAPTER_NAME} as the adapter",
            )
        return
    check_base(base, adapter)
    if differing := missing ^ _marked(adapter, "irq.stock.tau_rank", "u"):
        name = min(differing)
        raise WrongBase(
            "the base and the adapter are not of one pair",
            where=f"{adapter.path}: {name}",
            expected="offsets of this matrix" if name in missing else "no offsets: the base lacks none",
            hint="Use both files of one export",
        )


def matrices_without_offsets(base: GgufFile) -> set[str]:
    """Return the matrices of a stock model whose offsets its adapter carries, by name without ``.weight``.

    Raises:
        MalformedFile: A key is of the wrong type, or arrays differ in length.
    """
    return _marked(base, "irq.stock.tau", "b")


def _marked(gguf: GgufFile, key: str, kind: str) -> set[str]:
    """Return the names beside which an array holds true, or more than 0; without the key none."""
    fields = Fields(gguf.metadata, str(gguf.path))
    if not fields.has(key):
        return set()
    names, marks = fields.strings("irq.stock.name"), fields.array(key, kind)
    if len(names) != len(marks):
        raise MalformedFile(
            "parallel arrays differ in length",
            where=f"{gguf.path}: {key}",
            expected=len(names),
            got=len(marks),
        )
    return {name for name, mark in zip(names, marks, strict=True) if mark}
