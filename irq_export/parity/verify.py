"""``irq-export verify``: prove that an exported file computes what the checkpoint computes.

Level by level, from the bytes to the text: container, tensors, tokenizer and template, logits, greedy
tokens. Every level yields :class:`~irq_export.parity.report.Check` objects; gates are in
:mod:`irq_export.parity.gates`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_export.export.gguf import to_gguf
from irq_export.export.gguf.adapters import export_adapter
from irq_export.export.gguf.readback import is_same_model
from irq_export.parity.gates import FLOAT32_NMSE, FLOAT64_NMSE, KERNEL_RATIO, LOSSY_NMSE
from irq_export.parity.levels import corpus, greedy_level, tokenizer_level
from irq_export.parity.metrics import LogitMetrics, compare
from irq_export.parity.native import native_level
from irq_export.parity.report import Check, ParityReport
from irq_export.parity.runtimes import LlamaCppRuntime, ReferenceRuntime, TorchRuntime
from irq_export.parity.target import Target, is_onnx, open_target
from irq_export.parity.tensors import tensor_level
from irq_formats.checkpoint import Checkpoint, open_checkpoint
from irq_formats.errors import UsageError
from irq_runtime.tokenizer import load_tokenizer

__all__ = ["RUNTIMES", "verify"]

#: What ``runtimes`` may name.
RUNTIMES = ("reference", "llama.cpp", "native")

_PROMPT_TOKENS = 8  # of the text, continued greedily


def verify(
    file: str | Path,
    *,
    against: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
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
        adapter_gguf: A separate adapter file that belongs to ``file``.
        runtimes: Which of :data:`RUNTIMES`, for ONNX of :data:`ONNX_RUNTIMES`, to run; default: all that
            are installed.
        text: UTF-8 file to evaluate on; default: a passage that ships with the package.
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
    given = [adapter] if isinstance(adapter, str | Path) else adapter or []
    adapters = [Path(directory) for directory in given]
    checks: list[Check] = []
    checkpoint = open_checkpoint(Path(against))
    longest = checkpoint.model.max_position_embeddings - 1  # llama.cpp keeps room for one more
    if positions > longest or _PROMPT_TOKENS + greedy > longest:
        fitted = min(positions, longest), max(0, min(greedy, longest - _PROMPT_TOKENS))
        detail = f"{fitted[0]} of {positions} evaluated, {fitted[1]} of {greedy} generated"
        note = f"of {longest + 1} positions: {detail}"
        checks.append(Check("container", "context of the model", None, note))
        positions, greedy = fitted
    if is_onnx(Path(file)):
        from irq_export.parity.onnx_verify import ONNX_RUNTIMES, installed_runtimes, onnx_checks

        wanted = _wanted(runtimes, ONNX_RUNTIMES, installed_runtimes())
        if adapter_gguf is not None or adapter_scale != 1:
            raise UsageError("an ONNX export has its adapters in its folder, at scale 1", where=file)
        found = onnx_checks(
            Path(file),
            checkpoint,
            adapters,
            wanted,
            _read_text(text),
            positions=positions,
            greedy=greedy,
            threads=threads,
        )
    else:
        wanted = _wanted(runtimes, RUNTIMES, _installed())
        if len(adapters) > 1:
            raise UsageError("a GGUF file has one adapter", where=file, got=len(adapters))
        found = _checks(
            Path(file),
            checkpoint,
            adapters[0] if adapters else None,
            None if adapter_gguf is None else Path(adapter_gguf),
            wanted,
            _read_text(text),
            positions,
            greedy,
            adapter_scale,
            threads,
        )
    steps = ["container", "tensors", "tokenizer", *(f"logits, {name}" for name in wanted), "report"]
    for i, check in enumerate(found):
        checks.append(check)
        if progress is not None:
            progress(min(i, len(steps) - 1), len(steps), f"{check.level}: {check.name}")
    return ParityReport(
        str(file), str(against), tuple(checks), _environment(wanted), time.perf_counter() - started
    )


def _wanted(runtimes: Sequence[str] | None, known: Sequence[str], installed: Sequence[str]) -> list[str]:
    if runtimes is None:
        return list(installed)
    names = [name for group in runtimes for name in group.split(",")]
    for name in names:
        if name not in known:
            raise UsageError("unknown runtime", expected=" | ".join(known), got=name)
    return names


def _installed() -> list[str]:
    has_llama = importlib.util.find_spec("xllamacpp") is not None
    return [name for name in RUNTIMES if name != "llama.cpp" or has_llama]


def _read_text(text: str | Path | None) -> str:
    if text is None:
        return "\n".join(corpus())
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


def _checks(
    file: Path,
    checkpoint: Checkpoint,
    adapter_dir: Path | None,
    adapter_gguf: Path | None,
    wanted: Sequence[str],
    text: str,
    positions: int,
    greedy: int,
    adapter_scale: float,
    threads: int,
) -> Iterator[Check]:
    """Yield every check, from the bytes to the text."""
    target = open_target(file, adapter_gguf)
    source = adapter_dir or checkpoint.adapter_dir
    trained_adapter = None if source is None else export_adapter(checkpoint, source, "keep")
    yield Check("container", target.model.name, True, f"{len(target.gguf.tensors)} tensors, well formed")
    tensors = list(tensor_level(target, checkpoint, trained_adapter))
    yield from tensors
    if target.is_half or not is_same_model(target.gguf, checkpoint):
        return  # the tensor level has said so; there is nothing else to compare
    exact_weights = all(check.values.get("exact", True) for check in tensors)

    tokens = np.array(load_tokenizer(target.gguf).encode(text)[:positions])
    if tokens.size < 2:
        raise UsageError("the text is too short to compare logits", expected="2 tokens", got=int(tokens.size))
    with ExitStack() as stack:
        llama = None
        if "llama.cpp" in wanted and target.runs_on_stock:
            context = max(positions, _PROMPT_TOKENS + greedy)
            llama = stack.enter_context(
                LlamaCppRuntime(target.model, target.adapter, adapter_scale, threads, context)
            )
        yield from tokenizer_level(target, checkpoint.path, llama)
        prompt = tokens[:_PROMPT_TOKENS].tolist()
        if "reference" in wanted:
            trained = TorchRuntime(checkpoint.path, trained_adapter, "float64")
            runtime = ReferenceRuntime(target.model, target.adapter, adapter_scale, "float64")
            metrics = compare(trained.logits(tokens), runtime.logits(tokens), tokens)
            bound = FLOAT64_NMSE if exact_weights else LOSSY_NMSE
            yield _nmse_check(f"{runtime.name} against {trained.name}", metrics, bound)
            if greedy:
                yield greedy_level(trained, runtime, prompt, greedy, exact=exact_weights)
            del trained, runtime
        if "llama.cpp" not in wanted and "native" not in wanted:
            return
        trained = TorchRuntime(checkpoint.path, trained_adapter, "float32")
        expected = trained.logits(tokens)
        noise = None  # of llama.cpp's own 8-bit kernels on these weights
        if "llama.cpp" in wanted:
            for check in _llama_level(
                checkpoint, source, expected, target, llama, adapter_scale, tokens, threads
            ):
                noise = check.values.get("kernel_noise", noise)
                yield check
            if llama is not None and greedy:
                yield greedy_level(trained, llama, prompt, greedy, exact=False)
        if "native" in wanted:
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


def _nmse_check(name: str, metrics: LogitMetrics, bound: float) -> Check:
    return Check(
        "logits",
        name,
        metrics.nmse <= bound,
        f"NMSE {metrics.nmse:.2e}, KL {metrics.kl_mean:.2e}, top-1 {metrics.top1:.1%}, "
        f"perplexity {metrics.perplexity:.4f} ({metrics.perplexity_reference:.4f}), "
        f"{metrics.positions} positions",
        {**metrics.to_dict(), "nmse_bound": bound},
        f"NMSE <= {bound:g}",
    )


def _llama_level(
    checkpoint: Checkpoint,
    adapter_dir: Path | None,
    trained: NDArray[np.floating],
    target: Target,
    llama: LlamaCppRuntime | None,
    adapter_scale: float,
    tokens: NDArray[np.integer],
    threads: int,
) -> Iterator[Check]:
    """Yield the checks against stock llama.cpp.

    First the float32 re-expansion of the checkpoint (W + scaling·B'A' merged in float, no 8-bit
    activations): it shows that llama.cpp computes the network that was trained. Then the file itself,
    whose kernels round activations: its distance from torch must not exceed :data:`KERNEL_RATIO` times
    the kernels' own noise, which is the distance of the file, adapter at scale 1, from that re-expansion
    (their weights are equal: the tensor level has shown that).
    """
    with tempfile.TemporaryDirectory(prefix="irq-verify-") as directory:
        expanded = Path(directory) / "float32.gguf"
        to_gguf(
            checkpoint.path,
            expanded,
            merge="f32",
            adapter_dir=adapter_dir,
            adapter="keep" if adapter_dir is None else "merge",
        )
        with LlamaCppRuntime(expanded, None, 1.0, threads, len(tokens)) as plain:
            float32 = plain.logits(tokens)
    yield _nmse_check(
        "llama.cpp on the float32 re-expansion against torch float32",
        compare(trained, float32, tokens),
        FLOAT32_NMSE,
    )
    if llama is None:
        return
    logits = whole = llama.logits(tokens)
    if adapter_scale != 1:
        with LlamaCppRuntime(target.model, target.adapter, 1.0, threads, len(tokens)) as unscaled:
            whole = unscaled.logits(tokens)
    metrics, noise = compare(trained, logits, tokens), compare(float32, whole, tokens)
    ratios = metrics.nmse / max(noise.nmse, FLOAT32_NMSE), metrics.kl_mean / max(noise.kl_mean, FLOAT32_NMSE)
    yield Check(
        "logits",
        "llama.cpp against torch float32",
        all(ratio <= KERNEL_RATIO for ratio in ratios) and metrics.nmse <= LOSSY_NMSE,
        f"NMSE {metrics.nmse:.2e}, KL {metrics.kl_mean:.2e}, top-1 {metrics.top1:.1%}; "
        f"its own kernels' noise: NMSE {noise.nmse:.2e}, KL {noise.kl_mean:.2e}",
        {**metrics.to_dict(), "kernel_noise": noise.to_dict()},
        f"<= {KERNEL_RATIO} x that noise, NMSE <= {LOSSY_NMSE:g}",
    )
