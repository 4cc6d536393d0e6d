"""The custom-op library for onnxruntime: our kernels for ``irq::MatMulBlocks<KIND>`` (spec/irq-onnx.md).

Exported models run without it, through their function bodies; with it onnxruntime calls the kernels::

    options = onnxruntime.SessionOptions()
    irq_runtime.onnx.register(options)
    session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])

The library comes with this package and is only ever loaded from there: a model cannot name it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from irq_formats.errors import UnsupportedModel
from irq_runtime import _native

__all__ = ["library_path", "register"]


class SessionOptions(Protocol):
    """The part of ``onnxruntime.SessionOptions`` that is used: this module does not import onnxruntime."""

    def register_custom_ops_library(self, path: str, /) -> None:
        """Load a library and let it add its operators."""


#: Options that have our kernels; they are forgotten with their last user.
_registered: WeakSet[SessionOptions] = WeakSet()


def library_path() -> Path:
    """Return where the library lies: beside the compiled module of this package.

    Raises:
        UnsupportedModel: This installation has none.
    """
    path = Path(_native.__file__).resolve().parent / "libirq_onnx.so"
    if not path.is_file():
        raise UnsupportedModel(
            "no custom-op library in this installation",
            where=path,
            hint="install irq-export from a wheel, or build it again",
        )
    return path


def register(session_options: SessionOptions) -> None:
    """Add our kernels to the sessions that will be made with these options.

    They run on the CPU. In a session that also uses another execution provider, onnxruntime would still give
    them the quantised layers and copy activations to and fro, so leave them out there.

    Options that have them already are left as they are: onnxruntime takes a domain once.

    Args:
        session_options: An ``onnxruntime.SessionOptions``, version 1.17 or later.

    Raises:
        UnsupportedModel: This installation has no library.
    """
    if session_options not in _registered:
        session_options.register_custom_ops_library(str(library_path()))
        _registered.add(session_options)
