"""``irq-export verify``: prove that an exported file computes what the checkpoint computes.

Level by level, from the bytes to the text: container, tensors, tokenizer and template, logits, greedy
tokens. Every level yields :class:`~irq_export.parity.report.Check` objects; gates are in
:mod:`irq_export.parity.gates`.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from irq_export.parity.gguf_verify import GGUF_RUNTIMES, gguf_checks, installed_runtimes
from irq_export.parity.levels import PROMPT_TOKENS
from irq_export.parity.report import Check, ParityReport
from irq_export.parity.target import is_onnx
from irq_export.parity.tokenizers import corpus
from irq_formats.checkpoint import Checkpoint, open_checkpoint
from irq_formats.errors import UsageError

__all__ = ["verify"]


def verify(
    file: str | Path,
    *,
    against: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
    no_adapter: bool = False,
    adapter_gguf: str | Path | None = None,
    runtimes: Sequence[str] | None = None,
    text: str | Path | None = None,
    positions: int = 256,
    greedy: int = 64,
    adapter_scale: float = 1.0,
    threads: int = 2,
    progress: Callable[[int, int, str], None] | None = None,
) -> ParityReport:
    """Compare an export with the checkpoint it was made from.

    Args:
        file: GGUF file, the directory of a stock pair, or an ONNX model or its directory.
        against: The checkpoint directory.
        adapter: PEFT directory of the adapter, of an ONNX export those of all its adapters; default: the
            checkpoint's own, if it has one.
        no_adapter: The export has none, whatever the checkpoint has (``to-gguf --adapter drop``).
        adapter_gguf: A separate adapter file that belongs to ``file``.
        runtimes: Which of :data:`GGUF_RUNTIMES`, for ONNX of :data:`ONNX_RUNTIMES`, to run; default: all that
            are installed.
        text: UTF-8 file to evaluate on; default: a passage that ships with the package; without a tokenizer
            random tokens.
        positions: Tokens of the text to evaluate; fewer, and the report says so, if the model takes fewer.
        greedy: Tokens to generate, likewise; 0 skips the level.
        adapter_scale: Scale given to the runtimes' adapter. Anything but 1 must fail: a test of the test.
        threads: Compute threads of the runtimes.
        progress: Called after every check with (done, total, its name); the total is an estimate.

    Returns:
        The report; ``report.passed`` is the verdict.

    Raises:
        UsageError: Unknown runtime, nothing at ``file``, a text that cannot be read, or adapters that are
            not those of the file.
        WrongBase: The adapter was trained against another base.
        MalformedFile: The file or the checkpoint breaks its specification so that nothing can be compared.
    """
    started = time.perf_counter()
    checks: list[Check] = []
    checkpoint = open_checkpoint(Path(against))
    adapters = _adapters(checkpoint, adapter, no_adapter=no_adapter)
    target, context = None, checkpoint.model.max_position_embeddings
    if is_onnx(Path(file)):
        from irq_export.parity.onnx_target import open_onnx_target

        target = open_onnx_target(Path(file), checkpoint, adapters)
        context = target.context
    longest = context - 1  # llama.cpp keeps room for one more
    if positions > longest or PROMPT_TOKENS + greedy > longest:
        fitted = min(positions, longest), max(0, min(greedy, longest - PROMPT_TOKENS))
        detail = f"{fitted[0]} of {positions} evaluated, {fitted[1]} of {greedy} generated"
        note = f"of {longest + 1} positions: {detail}"
        checks.append(Check("container", "context of the model", None, note))
        positions, greedy = fitted
    passage = _read_text(text)
    if target is not None:
        from irq_export.parity import onnx_verify

        wanted = _wanted(runtimes, onnx_verify.ONNX_RUNTIMES, onnx_verify.installed_runtimes())
        if adapter_gguf is not None or adapter_scale != 1:
            raise UsageError("an ONNX export has its adapters in its folder, at scale 1", where=file)
        found = onnx_verify.onnx_checks(
            target,
            wanted,
            passage if passage is not None else "\n".join(corpus()),
            positions=positions,
            greedy=greedy,
            threads=threads,
        )
    else:
        wanted = _wanted(runtimes, GGUF_RUNTIMES, installed_runtimes())
        if len(adapters) > 1:
            raise UsageError("a GGUF file has one adapter", where=file, got=len(adapters))
        found = gguf_checks(
            Path(file),
            checkpoint,
            adapters[0] if adapters else None,
            None if adapter_gguf is None else Path(adapter_gguf),
            wanted,
            passage,
            positions=positions,
            greedy=greedy,
            adapter_scale=adapter_scale,
            threads=threads,
        )
    steps = ["container", "tensors", "tokenizer", *(f"logits, {name}" for name in wanted), "report"]
    for i, check in enumerate(found):
        checks.append(check)
        if progress is not None:
            progress(min(i, len(steps) - 1), len(steps), f"{check.level}: {check.name}")
    ran = any(check.level == "logits" and check.passed is not None for check in checks)
    if wanted and not ran and all(check.passed is not False for check in checks):
        checks.append(Check("logits", "no runtime", False, "the file ran in none of those asked for"))
    return ParityReport(
        str(file), str(against), tuple(checks), _environment(wanted), time.perf_counter() - started
    )


def _adapters(
    checkpoint: Checkpoint, given: str | Path | Sequence[str | Path] | None, *, no_adapter: bool
) -> list[Path]:
    """Return the PEFT directories that the export must hold."""
    if no_adapter and given:
        raise UsageError("an adapter was given, and none", got=given)
    if no_adapter or given or checkpoint.adapter_dir is None:
        return [Path(path) for path in ([given] if isinstance(given, str | Path) else given or [])]
    return [checkpoint.adapter_dir]


def _wanted(runtimes: Sequence[str] | None, known: Sequence[str], installed: Sequence[str]) -> list[str]:
    if runtimes is None:
        return list(installed)
    names = [name for group in runtimes for name in group.split(",")]
    for name in names:
        if name not in known:
            raise UsageError("unknown runtime", expected=" | ".join(known), got=name)
    return names


def _read_text(text: str | Path | None) -> str | None:
    if text is None:
        return None
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=text, expected="a UTF-8 file", got=error) from error


def _environment(wanted: Sequence[str]) -> dict[str, str]:
    packages = ["irq-export", "torch", "transformers", "numpy"]
    packages += ["xllamacpp"] * ("llama.cpp" in wanted)
    packages += ["onnxruntime"] * any("onnxruntime" in name or "genai" in name for name in wanted)
    packages += ["onnxruntime-genai"] * any("genai" in name for name in wanted)
    return {name: importlib.metadata.version(name) for name in packages}
