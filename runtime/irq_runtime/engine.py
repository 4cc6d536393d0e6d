"""The native engine: the reference runtime's interface over C++ (``runtime/src/engine``).

``exact`` computes what the reference computes, in float32; ``fast`` multiplies block-quantised matrices in
integers, with inputs rounded to 8, 12 or twice 8 bits, as the instruction set and the number of tokens ask
(``kernels.h``). The file is mapped, so that opening is instant and processes share its memory. A call
releases Python's lock; calls from several threads queue up. An engine does not survive ``fork``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.errors import UsageError
from irq_runtime import _native
from irq_runtime.machine import default_threads

__all__ = ["MODES", "Engine", "EngineInfo", "EngineSession"]

F32 = NDArray[np.float32]

#: What ``mode`` may be.
MODES = ("exact", "fast")


@dataclass(frozen=True)
class EngineInfo:
    """Sizes of an open model.

    Attributes:
        vocab_size: Logits per position.
        context: Positions a sequence may hold.
        file_bytes: Of the model, all shards.
        bytes_per_token: Of weights and adapters read to decode one token.
        sequence_bytes: Keys and values of one full sequence.
        isa: Instruction set in use: ``scalar``, ``scalar8``, ``avx2``, ``avx512``, ``neon`` or ``dotprod``.
    """

    vocab_size: int
    context: int
    file_bytes: int
    bytes_per_token: int
    sequence_bytes: int
    isa: str


class Engine:
    """A model ready to run.

    Args:
        path: GGUF of the irq profile, or a stock one in F32, F16, BF16, Q8_0, Q4_0, Q4_1 or Q2_0.
        adapter: Adapter file of the same profile; None: what the model embeds, if anything.
        adapter_scale: Multiplier of the adapter.
        threads: 1 to 256; None: the cores of this machine (:func:`irq_runtime.machine.default_threads`).
        mode: ``exact`` or ``fast``.
        context: Positions a sequence may hold; None: the model's own, 4096 at most.
        half_cache: Keep keys and values in fp16 instead of float32.

    Attributes:
        info: Sizes of the model.
        mode: As given.
        threads: How many compute.

    Raises:
        UsageError: No such file, the base of a pair without its adapter, a scale without an adapter, or an
            option is out of range.
        MalformedFile: A file breaks its specification.
        UnsupportedModel: Another architecture, or a tensor type the engine does not compute with.
        WrongBase: The adapter belongs to another base, or to another pair.
    """

    def __init__(
        self,
        path: str | Path,
        adapter: str | Path | None = None,
        adapter_scale: float = 1.0,
        *,
        threads: int | None = None,
        mode: str = "exact",
        context: int | None = None,
        half_cache: bool = False,
    ) -> None:
        if mode not in MODES:
            raise UsageError("unknown mode", expected=" | ".join(MODES), got=mode)
        if threads is None:
            threads = default_threads()
        if not 1 <= threads <= 256 or (context is not None and context < 1):
            raise UsageError(
                "out of range", expected="1 to 256 threads, context >= 1", got=(threads, context)
            )
        self.mode = mode
        self.threads = threads
        self._engine = _native.Engine(
            str(path),
            "" if adapter is None else str(adapter),
            adapter_scale,
            threads,
            mode == "fast",
            context or 0,
            half_cache,
        )
        self.info = EngineInfo(**self._engine.info())

    def new_cache(self) -> _native.Sequence:
        """Return an empty sequence, with ``length``, ``capacity`` and ``truncate(length)``."""
        return self._engine.new_sequence()

    def logits(self, tokens: Sequence[int]) -> F32:
        """Return the logits after every token of a text, float32 ``(n, vocab_size)``."""
        return self.step(tokens, self.new_cache())

    def step(self, tokens: Sequence[int], cache: _native.Sequence) -> F32:
        """Append tokens to a sequence and return the logits after each, float32 ``(n, vocab_size)``.

        Raises:
            UsageError: No tokens, one outside the vocabulary, or the sequence is full. Nothing is appended.
            MalformedFile: The model file changed on disk.
        """
        return self._engine.step(cache, _checked(tokens), last_only=False)

    def step_each(self, tokens: Sequence[int], caches: Sequence[_native.Sequence]) -> F32:
        """Append one token to each of several sequences, reading the weights once.

        Returns:
            Logits after each, float32 ``(n, vocab_size)``.

        Raises:
            UsageError: As :meth:`step`.
        """
        if len(tokens) != len(caches):
            raise UsageError("one token a sequence", expected=len(caches), got=len(tokens))
        return self._engine.step_each(list(caches), _checked(tokens))

    def session(self) -> EngineSession:
        """Return an empty context for :func:`irq_runtime.sampling.generate`."""
        return EngineSession(self)


class EngineSession:
    """An engine and the context it has read: implements :class:`irq_runtime.sampling.StepModel`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine._engine
        self.cache = engine.new_cache()

    def next_logits(self, tokens: Sequence[int]) -> F32:
        """Append tokens and return the logits after the last one, float32 ``(vocab_size,)``."""
        last: F32 = self._engine.step(self.cache, _checked(tokens), last_only=True)[0]
        return last


def _checked(tokens: Sequence[int]) -> list[int]:
    """Return tokens as integers that fit the native interface."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise UsageError("tokens must be a non-empty sequence of integers", got=ids.shape)
    limit = np.iinfo(np.int32).max
    return [int(token) if 0 <= token <= limit else -1 for token in ids]
