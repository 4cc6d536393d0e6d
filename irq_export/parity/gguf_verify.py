"""The levels of a verification of GGUF files: from their bytes to the text of three runtimes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_export.export.gguf.adapters import NO_ADAPTER, export_adapter
from irq_export.export.gguf.readback import is_same_model
from irq_export.parity.gates import FLOAT64_NMSE, LOSSY_NMSE
from irq_export.parity.levels import PROMPT_TOKENS, greedy_level, tokenizer_level
from irq_export.parity.llamacpp_level import llamacpp_level
from irq_export.parity.metadata import folder_checks, metadata_check, tokenizer_keys_check
from irq_export.parity.metrics import compare
from irq_export.parity.native import native_level
from irq_export.parity.report import Check, nmse_check
from irq_export.parity.runtimes import LlamaCppRuntime, ReferenceRuntime, TorchRuntime
from irq_export.parity.target import Target, open_target
from irq_export.parity.tensors import exported_adapter, tensor_level
from irq_export.parity.tokenizers import corpus
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UsageError
from irq_runtime.tokenizer import load_tokenizer

__all__ = ["GGUF_RUNTIMES", "gguf_checks", "installed_runtimes"]

GGUF_RUNTIMES = ("reference", "llama.cpp", "native")


def installed_runtimes() -> list[str]:
    """Return those of :data:`GGUF_RUNTIMES` that can run here."""
    has_llama = importlib.util.find_spec("xllamacpp") is not None
    return [name for name in GGUF_RUNTIMES if name != "llama.cpp" or has_llama]


def gguf_checks(
    path: Path,
    checkpoint: Checkpoint,
    adapter: Path | None,
    adapter_gguf: Path | None,
    runtimes: Sequence[str],
    text: str | None,
    *,
    positions: int,
    greedy: int,
    adapter_scale: float,
    threads: int,
) -> Iterator[Check]:
    """Yield every check, from the bytes to the text.

    Args:
        path: A file, or the directory of a stock pair.
        checkpoint: What it was made from.
        adapter: PEFT directory of the adapter in it; None: it has none.
        adapter_gguf: A separate adapter file that belongs to it.
        runtimes: Of :data:`GGUF_RUNTIMES`.
        text: To evaluate on; None: a passage of our own, or random tokens where there is no tokenizer.
        positions: Tokens of it.
        greedy: Tokens to generate; 0 skips the level.
        adapter_scale: The user's scale of the adapter.
        threads: Compute threads.

    Raises:
        UsageError: No runtime that was asked for can run it, it has no adapter to scale, or the text is too
            short.
        WrongBase: The adapter was trained against another base.
        MalformedFile: The file or the checkpoint breaks its specification.
    """
    target = open_target(path, adapter_gguf)
    _check_call(target, runtimes, adapter_scale)
    source = NO_ADAPTER if adapter is None else export_adapter(checkpoint, adapter, "keep")
    yield Check("container", target.model.name, True, f"{len(target.gguf.tensors)} tensors, well formed")
    tensors = list(tensor_level(target, checkpoint, source))
    yield from tensors
    if not is_same_model(target.gguf, checkpoint):
        return  # the tensor level has said so; there is nothing else to compare
    yield metadata_check(target, checkpoint, exported_adapter(target, source))
    if target.is_half:
        return  # no runtime opens it
    if path.is_dir():
        yield from folder_checks(path, target)
    exact_weights = all(check.values.get("exact", True) for check in tensors)

    tokens, has_text = _tokens(target, checkpoint, text, positions)
    prompt = tokens[:PROMPT_TOKENS].tolist()
    with ExitStack() as stack:
        llama = None
        if "llama.cpp" in runtimes and target.runs_on_stock:
            context = max(positions, PROMPT_TOKENS + greedy)
            llama = stack.enter_context(
                LlamaCppRuntime(target.model, target.adapter, adapter_scale, threads, context)
            )
        elif "llama.cpp" in runtimes:
            yield Check("logits", "llama.cpp", None, "not run: it cannot open a file of profile irq")
        if has_text:
            yield from tokenizer_level(target, checkpoint, llama)
        else:
            yield tokenizer_keys_check(target, checkpoint)
        trained_adapter = source if source.layers else None
        if "reference" in runtimes:
            trained = TorchRuntime(checkpoint.path, trained_adapter, "float64")
            runtime = ReferenceRuntime(target.model, target.adapter, adapter_scale, "float64")
            metrics = compare(trained.logits(tokens), runtime.logits(tokens), tokens)
            bound = FLOAT64_NMSE if exact_weights else LOSSY_NMSE
            yield nmse_check(f"{runtime.name} against {trained.name}", metrics, bound)
            if greedy:
                yield greedy_level(trained, runtime, prompt, greedy, exact=exact_weights)
            del trained, runtime
        if llama is None and "native" not in runtimes:
            return
        trained = TorchRuntime(checkpoint.path, trained_adapter, "float32")
        expected = trained.logits(tokens)
        noise = None  # of llama.cpp's own 8-bit kernels on these weights
        if llama is not None:
            for check in llamacpp_level(
                target,
                llama,
                checkpoint,
                source,
                expected,
                tokens,
                adapter_scale=adapter_scale,
                threads=threads,
            ):
                noise = check.values.get("kernel_noise", noise)
                yield check
            if greedy:
                yield greedy_level(trained, llama, prompt, greedy, exact=False)
        if "native" in runtimes:
            yield from native_level(
                target,
                trained,
                expected,
                tokens,
                prompt=prompt,
                greedy=greedy,
                adapter_scale=adapter_scale,
                threads=threads,
                exact_weights=exact_weights,
                noise=noise,
            )


def _check_call(target: Target, runtimes: Sequence[str], adapter_scale: float) -> None:
    """Refuse a call that would prove nothing."""
    if runtimes and not target.runs_on_stock and set(runtimes) == {"llama.cpp"}:
        raise UsageError(
            "llama.cpp cannot open a file of profile irq",
            where=target.model,
            hint="Verify it in reference and native, or export it with --profile stock",
        )
    has_adapter = target.adapter is not None or "irq.adapter.name" in target.gguf.metadata
    if adapter_scale != 1 and not has_adapter:
        raise UsageError("there is no adapter to scale", where=target.model, got=f"scale {adapter_scale:g}")


def _tokens(
    target: Target, checkpoint: Checkpoint, text: str | None, positions: int
) -> tuple[NDArray[np.int64], bool]:
    """Return the tokens ``(n,)`` to evaluate, and whether they are text: a file may have no tokenizer."""
    if "tokenizer.huggingface.json" not in target.gguf.metadata:
        if text is not None:
            raise UsageError(
                "the file has no tokenizer for a text", where=target.model, hint="Leave --text out"
            )
        rng = np.random.default_rng(0)
        return rng.integers(0, checkpoint.model.vocab_size, positions), False
    passage = "\n".join(corpus()) if text is None else text
    tokens = np.array(load_tokenizer(target.gguf).encode(passage)[:positions], np.int64)
    if tokens.size < 2:
        raise UsageError("the text is too short to compare logits", expected="2 tokens", got=int(tokens.size))
    return tokens, True
