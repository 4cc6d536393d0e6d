"""Adapters of an ONNX model: folded, transposed, scaled, and written as onnxruntime's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_export.export.gguf.adapters import export_adapter, lora_pair
from irq_export.export.onnx.linears import LoraPair
from irq_export.export.onnx.options import OnnxOptions
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import ParityFailed, UnsupportedModel

__all__ = ["ADAPTER_SUFFIX", "NamedAdapter", "open_adapters", "read_adapter_file", "write_adapter_file"]

ADAPTER_SUFFIX = ".onnx_adapter"

#: Version of the adapter's own format, which onnxruntime stores and does not look at.
_ADAPTER_VERSION = 1


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter on its way into a file, or into the model.

    Attributes:
        name: Of its file, without suffix.
        pairs: Side branches by module, in the order of the model.
        base_hash: Of the base it was trained on; None if it records none.
    """

    name: str
    pairs: Mapping[str, LoraPair]
    base_hash: str | None

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return self.name + ADAPTER_SUFFIX

    @property
    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """Arrays by the name of the graph input they replace."""
        parts = ((module, pair) for module, pair in self.pairs.items())
        return {
            f"{module}.lora_{x}": part for module, pair in parts for x, part in (("A", pair.a), ("B", pair.b))
        }

    @property
    def origins(self) -> list[str]:
        """Names of the adapter tensors it was made from."""
        return [origin for pair in self.pairs.values() for origin in pair.origins]


def open_adapters(checkpoint: Checkpoint, options: OnnxOptions) -> list[NamedAdapter]:
    """Read and fold the adapters of an export.

    Args:
        checkpoint: The base.
        options: Which directories; none means the checkpoint's own adapter, if it has one and the
            model takes adapters.

    Raises:
        WrongBase: An adapter was trained against another quantised base.
        MalformedFile: An adapter does not fit the model, or breaks its format.
        UnsupportedModel: A scaled value exceeds float32.
    """
    directories = list(options.adapters)
    if not directories and checkpoint.adapter_dir and (options.adapter_slots or options.bake_adapter):
        directories = [checkpoint.adapter_dir]
    return [_named(checkpoint, Path(directory)) for directory in directories]


def _named(checkpoint: Checkpoint, directory: Path) -> NamedAdapter:
    name = OnnxOptions.adapter_name(directory)
    adapter = export_adapter(checkpoint, directory, "fold")
    pairs = {}
    for module, layer in adapter.layers.items():
        with np.errstate(over="ignore"):
            a, b = (np.ascontiguousarray(part.T) for part in lora_pair(layer, None, 0))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UnsupportedModel("the adapter exceeds float32", where=f"{directory}: {module}")
        pairs[module] = LoraPair(a, b, (f"{name}/{module}.lora_A", f"{name}/{module}.lora_B"))
    return NamedAdapter(name, pairs, adapter.base_hash)


def write_adapter_file(path: Path, adapter: NamedAdapter) -> None:
    """Write an ``.onnx_adapter`` file."""
    import onnxruntime

    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in adapter.parameters.items()
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(_ADAPTER_VERSION)
    file.set_model_version(_ADAPTER_VERSION)
    file.set_parameters(values)
    file.export_adapter(str(path))


def read_adapter_file(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read an ``.onnx_adapter`` file.

    Raises:
        ParityFailed: onnxruntime cannot read it.
    """
    import onnxruntime

    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
    except RuntimeError as error:
        raise ParityFailed("onnxruntime cannot read the adapter", where=path, got=str(error)[:80]) from error
    return {name: value.numpy().copy() for name, value in file.get_parameters().items()}
