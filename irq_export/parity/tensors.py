"""The tensor level: every array of the file against the checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

from irq_export.export.gguf.readback import compare_files
from irq_export.parity.report import Check
from irq_export.parity.target import Target
from irq_formats.adapter import Adapter, fold_adapter_layers
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import ParityFailed
from irq_formats.gguf import GgufFile, open_gguf
from irq_formats.gguf.irq_payload import read_adapter

__all__ = ["tensor_level"]

_EMPTY = Adapter({}, None, {})
_PROFILE = {"irq": "irq", "pair": "stock", "merged": "merge"}


def tensor_level(target: Target, checkpoint: Checkpoint, adapter: Adapter | None) -> Iterator[Check]:
    """Compare codes, scales, offsets, plain tensors and adapter.

    Args:
        target: The export.
        checkpoint: What it was made from.
        adapter: The adapter as trained, or None.

    Yields:
        One check; ``values["exact"]`` says whether the file holds the weights without rounding.
    """
    extra = None if target.adapter is None else open_gguf(target.adapter)
    expected = adapter or _EMPTY
    if target.kind != "merged" and not _keeps_beta(target, extra):
        expected = fold_adapter_layers(expected)
    try:
        found = compare_files(_PROFILE[target.kind], target.gguf, extra, checkpoint, expected)
    except ParityFailed as error:
        yield Check("tensors", "file against checkpoint", False, str(error), gate="bit-equal")
        return
    detail = f"{found.exact} arrays bit-equal"
    if found.rounded:
        detail += (
            f"; {found.rounded} matrices hold their weights rounded, "
            f"NMSE {found.weight_nmse:.2e}, as their type must"
        )
    values = {"exact": found.weight_nmse < 1e-14, "weight_nmse": found.weight_nmse}
    yield Check("tensors", "file against checkpoint", True, detail, values, "bit-equal")


def _keeps_beta(target: Target, extra: GgufFile | None) -> bool:
    """Return whether the file holds the elastic connections unfolded."""
    layers = read_adapter(extra or target.gguf) if target.kind == "irq" else {}
    return any(layer.has_iec for layer in layers.values())
