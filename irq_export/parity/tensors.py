"""The tensor level: every array of the file against the checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

from irq_export.export.gguf.readback import compare_files
from irq_export.parity.report import Check
from irq_export.parity.target import Target
from irq_formats.adapter import Adapter, fold_adapter_layers
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import ParityFailed
from irq_formats.gguf import open_gguf
from irq_formats.gguf.irq_payload import read_adapter

__all__ = ["exported_adapter", "tensor_level"]

_PROFILE = {"irq": "irq", "pair": "stock", "merged": "merge"}


def tensor_level(target: Target, checkpoint: Checkpoint, adapter: Adapter) -> Iterator[Check]:
    """Compare codes, scales, offsets, plain tensors and adapter.

    Args:
        target: The export.
        checkpoint: What it was made from.
        adapter: The adapter as trained; no layers for none.

    Yields:
        One check; ``values["exact"]`` says whether the file holds the weights without rounding.
    """
    extra = None if target.adapter is None else open_gguf(target.adapter)
    expected = exported_adapter(target, adapter)
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


def exported_adapter(target: Target, adapter: Adapter) -> Adapter:
    """Return the adapter as the file holds it: folded, unless that has elastic connections."""
    if target.kind == "merged":
        return adapter
    source = target.gguf if target.adapter is None else open_gguf(target.adapter)
    layers = read_adapter(source) if target.kind == "irq" else {}
    return adapter if any(layer.has_iec for layer in layers.values()) else fold_adapter_layers(adapter)
