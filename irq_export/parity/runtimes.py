"""The runtimes a file can be run in, behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from irq_export.iec import attach
from irq_export.parity.llamacpp import LlamaCpp
from irq_export.quantizer import load_model
from irq_formats.adapter import Adapter
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model as load_reference

__all__ = ["LlamaCppRuntime", "NativeRuntime", "ReferenceRuntime", "Runtime", "TorchRuntime"]

Tokens = Sequence[int] | NDArray[np.integer]


class Runtime(Protocol):
    """What verification asks of a runtime."""

    name: str

    def logits(self, tokens: Tokens) -> NDArray[np.floating]:
        """Return logits or log-probabilities ``(n, vocab)`` at every position."""
        ...

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Return ``count`` most likely tokens in a row."""
        ...


class TorchRuntime:
    """The PyTorch model that was trained: dequantised base, adapter as a side branch.

    Args:
        checkpoint: Directory of the checkpoint.
        adapter: The adapter, or None.
        dtype: ``float64`` or ``float32``.
    """

    def __init__(self, checkpoint: Path, adapter: Adapter | None, dtype: str) -> None:
        self.name = f"torch {dtype}"
        self._model: torch.nn.Module = load_model(checkpoint, dtype=getattr(torch, dtype)).eval()
        if adapter is not None:
            attach(self._model, adapter, dtype=getattr(torch, dtype))

    def logits(self, tokens: Tokens) -> NDArray[np.floating]:
        """Return logits ``(n, vocab)``."""
        with torch.no_grad():
            out = self._model(torch.tensor([list(tokens)])).logits[0]
        result: NDArray[np.floating] = out.numpy()
        return result

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Return ``count`` tokens by argmax, with the model's own KV cache."""
        found: list[int] = []
        step, cache = torch.tensor([list(tokens)]), None
        with torch.no_grad():
            for _ in range(count):
                out = self._model(step, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                step = out.logits[:, -1].argmax(dim=-1, keepdim=True)
                found.append(int(step))
        return found


class ReferenceRuntime:
    """The numpy runtime: the executable specification.

    Args:
        model: A GGUF file.
        adapter: An adapter GGUF, or None.
        adapter_scale: The user's scale of the adapter.
        dtype: ``float64`` or ``float32``.
    """

    def __init__(self, model: Path, adapter: Path | None, adapter_scale: float, dtype: str) -> None:
        self.name = f"reference {dtype}"
        self._model = load_reference(model, adapter=adapter, adapter_scale=adapter_scale)
        self._dtype = np.dtype(dtype).type

    def logits(self, tokens: Tokens) -> NDArray[np.floating]:
        """Return logits ``(n, vocab)``."""
        return self._model.logits(list(tokens), dtype=self._dtype)

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Return ``count`` tokens by argmax, with a KV cache."""
        cache = self._model.new_cache(dtype=self._dtype)
        found: list[int] = []
        step = list(tokens)
        for _ in range(count):
            step = [int(self._model.step(step, cache)[-1].argmax())]
            found += step
        return found


class NativeRuntime:
    """The C++ engine.

    Args:
        model: A GGUF file.
        adapter: An adapter GGUF, or None.
        adapter_scale: The user's scale of the adapter.
        mode: ``exact`` or ``fast``.
        threads: Compute threads.
        context: Longest sequence, in tokens.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None,
        adapter_scale: float,
        mode: str,
        threads: int,
        context: int,
    ) -> None:
        self.name = f"native {mode}"
        self._engine = Engine(model, adapter, adapter_scale, threads=threads, mode=mode, context=context)

    def logits(self, tokens: Tokens) -> NDArray[np.floating]:
        """Return logits ``(n, vocab)``; of ``fast`` token by token, as it generates text."""
        if self._engine.mode == "exact":
            return self._engine.logits(list(tokens))
        session = self._engine.session()
        return np.stack([session.next_logits([token]) for token in tokens])

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Return ``count`` tokens by argmax, with a KV cache."""
        session = self._engine.session()
        found: list[int] = []
        step = list(tokens)
        for _ in range(count):
            step = [int(session.next_logits(step).argmax())]
            found += step
        return found


class LlamaCppRuntime:
    """Unmodified llama.cpp, through the xllamacpp wheel. A context manager.

    Args:
        model: A GGUF file of an architecture llama.cpp knows.
        adapter: A LoRA GGUF for it, or None.
        adapter_scale: The user's scale of the adapter.
        threads: Compute threads.
        context: Longest sequence, in tokens.
    """

    def __init__(
        self, model: Path, adapter: Path | None, adapter_scale: float, threads: int, context: int
    ) -> None:
        self.name = "llama.cpp"
        self._server = LlamaCpp(model, adapter, adapter_scale, threads, context)

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens llama.cpp adds unless told not to."""
        return self._server.tokenize(text, add_special)

    def logits(self, tokens: Tokens) -> NDArray[np.floating]:
        """Return log-probabilities float32 ``(n, vocab)``."""
        return self._server.logprobs(list(tokens))

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Return up to ``count`` most likely tokens; shorter if a token ends the generation."""
        return self._server.greedy(list(tokens), count)
