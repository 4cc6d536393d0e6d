"""irq-export: what you fine-tuned in 2-4 bits is exactly what runs on the device.

The public functions are imported on first use, so that ``import irq_export`` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from irq_export.export.fold_adapter import fold_adapter
    from irq_export.export.gguf import to_gguf
    from irq_export.parity.verify import verify
    from irq_export.quantize_model import quantize
    from irq_export.quantizer import load_model

_HOME = {
    "fold_adapter": "irq_export.export.fold_adapter",
    "load_model": "irq_export.quantizer",
    "quantize": "irq_export.quantize_model",
    "to_gguf": "irq_export.export.gguf",
    "verify": "irq_export.parity.verify",
}

__all__ = ["__version__", "fold_adapter", "load_model", "quantize", "to_gguf", "verify"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
