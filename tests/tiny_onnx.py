"""Running exported ONNX models, with caches and adapters, through unmodified onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from irq_runtime.onnx import register

__all__ = ["OnnxRunner", "nmse", "session_options"]

Array = NDArray[np.generic]


def session_options() -> onnxruntime.SessionOptions:
    """Options that keep quiet about inputs with defaults, on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


class OnnxRunner:
    """A session with the names of its caches.

    Args:
        directory: What ``to_onnx`` wrote.
        adapter: An ``.onnx_adapter`` file to run with.
        library: Whether our kernels run.
    """

    def __init__(self, directory: Path, adapter: Path | None = None, *, library: bool = False) -> None:
        options = session_options()
        if library:
            register(options)
        self.session = onnxruntime.InferenceSession(str(directory / "model.onnx"), options)
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        self.use(adapter)

    def use(self, adapter: Path | None) -> None:
        """Switch to another adapter, or to none."""
        self.options = onnxruntime.RunOptions()
        if adapter is not None:
            self.adapter = onnxruntime.LoraAdapter()
            self.adapter.Load(str(adapter))
            self.options.add_active_adapter(self.adapter)

    def empty_cache(self, batch: int) -> list[Array]:
        """Keys and values of no position."""
        dtype = np.float16 if "float16" in self.past[0].type else np.float32
        return [np.zeros((batch, v.shape[1], 0, v.shape[3]), dtype) for v in self.past]

    def step(
        self, ids: Array, cache: list[Array], mask: Array | None = None, **inputs: Array
    ) -> tuple[Array, list[Array]]:
        """Return the logits (batch, n, vocab) of ids (batch, n), and the cache after them."""
        total = cache[0].shape[2] + ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((len(ids), total), np.int64), **inputs}
        if mask is not None:
            feed["attention_mask"] = mask
        feed |= {value.name: array for value, array in zip(self.past, cache, strict=True)}
        logits, *present = self.session.run(None, feed, self.options)
        return logits, present

    def logits(self, ids: Array, mask: Array | None = None) -> Array:
        """Return the logits of a prompt."""
        return self.step(ids, self.empty_cache(len(ids)), mask)[0]


def nmse(got: Array, expected: Array) -> float:
    """Mean squared difference over variance."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.square(got - expected).mean() / expected.var())
