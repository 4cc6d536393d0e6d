"""Perplexity of a text, and the Kullback-Leibler divergence from saved logits.

The convention is that of llama.cpp's ``llama-perplexity``, so that numbers can be compared: the tokens
are cut into windows that do not overlap, each is read from an empty context (its first token replaced by
BOS where the tokenizer adds one), and the second half of each is scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irq_export.parity.metrics import log_softmax
from irq_formats.atomic import atomic_file
from irq_formats.errors import MalformedFile, UsageError
from irq_formats.gguf import open_gguf
from irq_formats.gguf.pair import model_files
from irq_formats.safetensors_io import SafeTensors, open_safetensors
from irq_formats.safetensors_types import TensorSpec
from irq_formats.safetensors_writer import SafeTensorsWriter
from irq_runtime.engine import Engine, EngineSession
from irq_runtime.model_file import check_context, read_config
from irq_runtime.reference import ReferenceSession, load_model
from irq_runtime.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Divergence", "PerplexityReport", "cut_windows", "perplexity"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Tokens = NDArray[np.int64]
Step = Callable[[list[int], Any], NDArray[np.floating]]
Reader = Callable[[list[int]], Iterator[NDArray[np.floating]]]

#: Positions whose logits are held at a time: those of a window would be larger than many a model.
_PIECE = 256

#: And of those, how many are scored at a time, in float64.
_ROWS = 32


@dataclass(frozen=True)
class Divergence:
    """Distance from the saved reference, over the scored positions.

    Attributes:
        kl_mean: Mean KL(reference || model), nats.
        kl_p999: Its 99.9th percentile, nats.
        top1: Share of positions with the same most likely token.
        perplexity_reference: Of the same positions.
    """

    kl_mean: float
    kl_p999: float
    top1: float
    perplexity_reference: float


@dataclass(frozen=True)
class PerplexityReport:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        standard_error: Of the perplexity, from the spread of the likelihoods.
        scored: Tokens scored.
        windows: Windows read.
        context: Tokens of a window.
        divergence: From the saved logits, if any were given.
    """

    perplexity: float
    standard_error: float
    scored: int
    windows: int
    context: int
    divergence: Divergence | None

    def to_dict(self) -> dict[str, object]:
        """Return the fields, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the result for people."""
        text = f"perplexity {self.perplexity:.4f} ± {self.standard_error:.4f} ({self.scored} tokens)"
        if self.divergence is not None:
            d = self.divergence
            text += (
                f"\nKL {d.kl_mean:.3e} (99.9 %: {d.kl_p999:.3e}), top-1 {d.top1:.2%}, "
                f"perplexity of the reference {d.perplexity_reference:.4f}"
            )
        return text


def perplexity(
    *,
    model: str | Path,
    text: str | Path,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    tokenizer: str | Path | None = None,
    runtime: str = "native",
    mode: str = "exact",
    threads: int | None = None,
    context: int = 512,
    windows: int | None = None,
    save_logits: str | Path | None = None,
    kl_against: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> PerplexityReport:
    """Measure how well a model predicts a text.

    Args:
        model: GGUF, or the directory of a stock pair.
        text: UTF-8 file.
        adapter: Separate adapter file.
        adapter_scale: Its multiplier.
        tokenizer: ``tokenizer.json`` or Hugging Face directory, for a file without a tokenizer.
        runtime: ``native`` or ``reference`` (float32).
        mode: Of the native engine, ``exact`` or ``fast``.
        threads: Of the native engine; None: the cores of this machine.
        context: Tokens of a window, at least 4.
        windows: Read so many at most; None: all.
        save_logits: Write the scored logits here (float32, vocab_size * context / 2 values a window).
        kl_against: Logits saved from another model or mode, on the same text.
        overwrite: Replace an existing ``save_logits``.
        progress: Called with (done, total, what) before every window.

    Raises:
        UsageError: The text is shorter than a window or not UTF-8, or an option is out of range.
        MalformedFile: The saved logits do not belong to this text.
        OutputExists: ``save_logits`` exists.
    """
    if context < 4 or (windows is not None and windows < 1):
        raise UsageError("out of range", expected="context >= 4, windows >= 1", got=(context, windows))
    model, adapter = model_files(model, adapter)
    gguf = open_gguf(model)
    config = read_config(gguf)
    check_context(config, context)
    tokens = cut_windows(load_tokenizer(gguf, tokenizer), _read_text(Path(text)), context)[:windows]
    if not len(tokens):
        raise UsageError("the text is shorter than a window", where=text, expected=f"{context} tokens")
    saved = None if kl_against is None else _open_saved(Path(kl_against), tokens, config.vocab_size)
    read = _runtime(runtime, model, adapter, adapter_scale, mode, threads, context)
    scorer = _Scorer()

    def score() -> Iterator[F32]:
        number = itertools.count()
        for i, window in enumerate(tokens):
            if progress is not None:
                progress(i, len(tokens), f"window {i + 1}")
            for piece, logits in zip(_pieces(context), read(window.tolist()), strict=True):
                reference = None if saved is None else saved.read_f32(f"logits.{next(number)}")
                scorer.add(logits, window[piece.start + 1 : piece.stop + 1], reference)
                yield logits.astype(np.float32, copy=False)

    if save_logits is None:
        for _ in score():
            pass
    else:
        _save(Path(save_logits), tokens, score(), config.vocab_size, overwrite)
    return scorer.report(len(tokens), context)


def cut_windows(tokenizer: Tokenizer, text: str, context: int) -> Tokens:
    """Return the windows of a text, (windows, context); a rest shorter than a window is dropped."""
    ids = np.array(tokenizer.encode(text), np.int64)
    cut = ids[: ids.size // context * context].reshape(-1, context)
    if tokenizer.bos is not None and ids.size and ids[0] == tokenizer.bos:
        cut[:, 0] = tokenizer.bos
    return cut


def _pieces(context: int) -> list[slice]:
    """Return the positions of a window that are scored; each predicts the token after it."""
    end = context - 1
    return [slice(begin, min(begin + _PIECE, end)) for begin in range(context // 2 - 1, end, _PIECE)]


def _runtime(
    runtime: str,
    model: str | Path,
    adapter: str | Path | None,
    adapter_scale: float,
    mode: str,
    threads: int | None,
    context: int,
) -> Reader:
    if runtime == "native":
        engine = Engine(model, adapter, adapter_scale, threads=threads, mode=mode, context=context)
        return partial(_read, engine.session, engine.step)
    if runtime == "reference":
        if mode != "exact":
            raise UsageError("the reference has one mode", expected="exact", got=mode)
        reference = load_model(model, adapter, adapter_scale)
        return partial(_read, partial(reference.session, np.float32), reference.step)
    raise UsageError("unknown runtime", expected="native | reference", got=runtime)


def _read(
    new_session: Callable[[], EngineSession | ReferenceSession], step: Step, window: list[int]
) -> Iterator[NDArray[np.floating]]:
    """Yield the logits of the pieces of a window, each (positions, vocab)."""
    session, pieces = new_session(), _pieces(len(window))
    session.next_logits(window[: pieces[0].start])
    for piece in pieces:
        yield step(window[piece], session.cache)


class _Scorer:
    """Collects one number a scored position."""

    def __init__(self) -> None:
        self.losses: list[F64] = []  # negative log-likelihoods, nats
        self.reference_losses: list[F64] = []
        self.divergences: list[F64] = []  # KL per position, nats
        self.agreements: list[NDArray[np.bool_]] = []

    def add(self, logits: NDArray[np.floating], following: Tokens, reference: F32 | None) -> None:
        """Score logits (n, vocab) against the tokens (n,) that follow, and against a reference."""
        for begin in range(0, len(following), _ROWS):
            rows = slice(begin, begin + _ROWS)
            self._add(logits[rows], following[rows], None if reference is None else reference[rows])

    def _add(self, logits: NDArray[np.floating], following: Tokens, reference: F32 | None) -> None:
        rows = np.arange(len(following))
        q = log_softmax(logits)
        self.losses.append(-q[rows, following])
        if reference is None:
            return
        p = log_softmax(reference)
        self.reference_losses.append(-p[rows, following])
        self.divergences.append(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))
        self.agreements.append(p.argmax(axis=1) == q.argmax(axis=1))

    def report(self, windows: int, context: int) -> PerplexityReport:
        """Return the report over all that was added."""
        losses = np.concatenate(self.losses)
        value = float(np.exp(losses.mean()))
        divergence = None
        if self.divergences:
            kl = np.concatenate(self.divergences)
            divergence = Divergence(
                float(kl.mean()),
                float(np.quantile(kl, 0.999)),
                float(np.concatenate(self.agreements).mean()),
                float(np.exp(np.concatenate(self.reference_losses).mean())),
            )
        error = value * float(losses.std(ddof=1)) / losses.size**0.5
        return PerplexityReport(value, error, losses.size, windows, context, divergence)


def _save(path: Path, tokens: Tokens, logits: Iterator[F32], vocab_size: int, overwrite: bool) -> None:
    """Write ``tokens`` and one tensor of logits a piece of a window."""
    specs = [TensorSpec("tokens", "I64", tokens.shape)]
    specs += [TensorSpec(name, "F32", shape) for name, shape in _saved_shapes(tokens, vocab_size)]
    with (
        atomic_file(path, overwrite=overwrite) as file,
        SafeTensorsWriter(file, specs, {"irq.kind": "logits"}) as writer,
    ):
        writer.write("tokens", tokens)
        for i, piece in enumerate(logits):
            writer.write(f"logits.{i}", np.ascontiguousarray(piece))


def _saved_shapes(tokens: Tokens, vocab_size: int) -> Iterator[tuple[str, tuple[int, int]]]:
    windows, context = tokens.shape
    for i, piece in enumerate(_pieces(context) * windows):
        yield f"logits.{i}", (piece.stop - piece.start, vocab_size)


def _open_saved(path: Path, tokens: Tokens, vocab_size: int) -> SafeTensors:
    saved = open_safetensors(path)
    if saved.metadata.get("irq.kind") != "logits" or "tokens" not in saved.tensors:
        raise MalformedFile("not saved logits", where=path, expected="a file of --save-logits")
    known = saved.read("tokens")
    if known.shape[1:] != tokens.shape[1:] or not np.array_equal(known[: len(tokens)], tokens):
        raise MalformedFile(
            "the saved logits belong to another text, tokenizer or context",
            where=path,
            expected=f"windows {tokens.shape}",
            got=known.shape,
        )
    for name, shape in _saved_shapes(tokens, vocab_size):
        ref = saved.tensors.get(name)
        if ref is None or (ref.dtype, ref.shape) != ("F32", shape):
            raise MalformedFile(
                "the saved logits belong to another vocabulary",
                where=f"{path}: {name}",
                expected=f"F32 {shape}",
                got=None if ref is None else f"{ref.dtype} {ref.shape}",
            )
    return saved


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", where=path, got=error) from error
