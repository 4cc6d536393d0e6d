"""The levels of a verification of an ONNX export: from its bytes to the text of three runtimes.

The container level decides whether anything of the folder is run at all: no runtime sees a model that our
reader has not accepted, a configuration that names other code, or a library that is not ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_export.export.onnx.companions import copied_files
from irq_export.parity.gates import FLOAT32_NMSE, LOAD_MEMORY_RATIO, LOSSY_NMSE, SESSION_BYTES
from irq_export.parity.levels import PROMPT_TOKENS
from irq_export.parity.metrics import compare
from irq_export.parity.onnx_runtimes import OnnxRuntime, count_kernels, measure_load, run_genai
from irq_export.parity.onnx_target import Case, OnnxTarget
from irq_export.parity.report import Check, nmse_check
from irq_export.parity.runtimes import TorchRuntime
from irq_export.parity.tokenizers import Sample, TrainedTokenizer, tokens_check
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.onnx.operators import DOMAIN

__all__ = ["ONNX_RUNTIMES", "installed_runtimes", "onnx_checks"]

#: ``+irq``: with our library.
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime+irq", "genai", "genai+irq")

#: An adapter whose effect is smaller than this could be forgotten and the gates would hold.
_APART = 100 * FLOAT32_NMSE


def installed_runtimes() -> list[str]:
    """Return those of :data:`ONNX_RUNTIMES` that can run here."""
    has_genai = importlib.util.find_spec("onnxruntime_genai") is not None
    return [name for name in ONNX_RUNTIMES if has_genai or not name.startswith("genai")]


def onnx_checks(
    target: OnnxTarget,
    runtimes: Sequence[str],
    text: str,
    *,
    positions: int,
    greedy: int,
    threads: int,
) -> Iterator[Check]:
    """Yield every check, from the bytes to the text.

    Args:
        target: The export, opened.
        runtimes: Of :data:`ONNX_RUNTIMES`.
        text: To evaluate on.
        positions: Tokens of it.
        greedy: Tokens to generate; 0 skips the level.
        threads: Compute threads.

    Raises:
        UsageError: There is too little text, or no runtime that was asked for has anything to run.
        MalformedFile: The export breaks its specification.
    """
    checkpoint = target.checkpoint
    container = list(target.container_level())
    yield from container
    if not all(check.passed for check in container):
        return
    tensors = target.tensor_level()
    yield tensors
    tokenizer = TrainedTokenizer(checkpoint.path)
    samples = tokenizer.samples()
    yield from _tokenizer_level(target, samples)
    tokens = np.array(tokenizer.encode(text)[:positions])
    if tokens.size < 2:
        raise UsageError("the text is too short to compare logits", expected="2 tokens", got=int(tokens.size))
    names = [name for name in runtimes if target.options.profile == "irq" or not name.endswith("+irq")]
    if runtimes and not names:
        raise UsageError(
            "an export of profile stock has no nodes for our library",
            where=target.folder,
            got=", ".join(runtimes),
        )
    for name in [name for name in runtimes if name not in names]:
        yield Check("logits", name, None, "not run: profile stock has no nodes for our library")
    for name in names:
        if name.startswith("onnxruntime"):
            yield from _or_failure("kernels", name, _loading_level(target, name))
    if not names:
        return
    trained = [_Trained.of(checkpoint, case, tokens, greedy) for case in target.cases]
    for one in trained[1:]:
        moved = compare(trained[0].logits, one.logits, tokens).nmse
        detail = f"NMSE {moved:.2e} from the base in torch: what follows tells them apart"
        yield Check("logits", f"adapter {one.case.name}", moved > _APART, detail, gate=f"NMSE > {_APART:g}")
    exact = bool(tensors.values.get("exact"))
    for name in names:
        if name.startswith("onnxruntime"):
            found = _session_level(target, name, trained, tokens, threads=threads, exact=exact)
        else:
            found = _genai_level(target, name, trained, tokens, samples, threads=threads, exact=exact)
        yield from _or_failure("logits", name, found)


def _tokenizer_level(target: OnnxTarget, samples: Sequence[Sample]) -> Iterator[Check]:
    """Compare the files, and what transformers reads from them."""
    source = target.checkpoint.path
    files = [file.relative_to(source).as_posix() for file in copied_files(source)]
    wrong = [name for name in files if not _same_file(target.folder / name, source / name)]
    detail = f"{len(files)} files byte-equal" if not wrong else f"differ: {', '.join(wrong)}"
    yield Check("tokenizer", "files", not wrong, detail, gate="byte-equal")
    if not wrong:
        exported = TrainedTokenizer(target.folder)
        yield tokens_check(
            "transformers in the folder",
            samples,
            lambda text, add_special: exported.encode(text, add_special=add_special),
        )


def _same_file(path: Path, other: Path) -> bool:
    return path.is_file() and path.read_bytes() == other.read_bytes()


class _Trained:
    """What torch computes for a case: logits ``(n, vocab)`` and greedy tokens."""

    def __init__(
        self, case: Case, logits: NDArray[np.floating], greedy: list[int], prompt: list[int]
    ) -> None:
        self.case, self.logits, self.greedy, self.prompt = case, logits, greedy, prompt
        self.name = f"torch float32{f', adapter {case.name}' if case.name else ''}"

    @classmethod
    def of(cls, checkpoint: Checkpoint, case: Case, tokens: NDArray[np.integer], greedy: int) -> _Trained:
        """Run torch; its model is gone afterwards."""
        runtime = TorchRuntime(checkpoint.path, case.adapter, "float32")
        prompt = tokens[:PROMPT_TOKENS].tolist()
        return cls(case, runtime.logits(tokens), runtime.greedy(prompt, greedy), prompt)


def _or_failure(level: str, name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield checks; a runtime that cannot run the model fails one."""
    try:
        yield from checks
    except UnsupportedModel as error:
        yield Check(level, name, False, str(error))


def _loading_level(target: OnnxTarget, name: str) -> Iterator[Check]:
    yield _memory_check(target, name)
    yield from _kernels_check(target, name)


def _memory_check(target: OnnxTarget, name: str) -> Check:
    size, peak = target.nbytes, measure_load(target.model, library=name.endswith("+irq"))
    decides = size >= SESSION_BYTES
    detail = (
        f"peak {peak / 2**20:.0f} MiB above the process before, {peak / size:.2f} x the files"
        f" (VmHWM - VmRSS of a fresh process, 1 thread)"
    )
    values = {"peak_bytes": peak, "file_bytes": size}
    gate = f"<= {LOAD_MEMORY_RATIO} x" if decides else f"decides from {SESSION_BYTES >> 20} MiB of files on"
    return Check(
        "memory",
        f"loading in {name}",
        peak <= LOAD_MEMORY_RATIO * size if decides else None,
        detail,
        values,
        gate,
    )


def _kernels_check(target: OnnxTarget, name: str) -> Iterator[Check]:
    """The kernel really ran where the library is registered, and the function body where it is not."""
    nodes = sum(node.domain == DOMAIN for node in target.model.proto.graph.node)
    if not nodes:
        return
    has_library = name.endswith("+irq")
    ran, expected = count_kernels(target.model, library=has_library), nodes if has_library else 0
    detail = f"{ran} of {nodes} matrices ran in our kernels, by onnxruntime's profile"
    yield Check("kernels", name, ran == expected, detail, {"ran": ran, "nodes": nodes}, f"{expected}")


def _session_level(
    target: OnnxTarget,
    name: str,
    trained: Sequence[_Trained],
    tokens: NDArray[np.integer],
    *,
    threads: int,
    exact: bool,
) -> Iterator[Check]:
    """One session; adapters are swapped in it, and the base comes once more at the end."""
    runtime = OnnxRuntime(target.model, library=name.endswith("+irq"), threads=threads)
    for one in trained:
        runtime.use(one.case.file)
        yield _logits_check(runtime.name, one, runtime.logits(tokens), tokens, exact=exact)
        if one.greedy:
            yield _greedy_check(runtime.name, one, runtime.greedy(one.prompt, len(one.greedy)), exact=exact)
    if len(trained) > 1:
        runtime.use(None)
        again = f"{runtime.name}, adapters taken out again,"
        yield _logits_check(again, trained[0], runtime.logits(tokens), tokens, exact=exact)


def _genai_level(
    target: OnnxTarget,
    name: str,
    trained: Sequence[_Trained],
    tokens: NDArray[np.integer],
    samples: Sequence[Sample],
    *,
    threads: int,
    exact: bool,
) -> Iterator[Check]:
    vocab, expected_tokens = target.checkpoint.model.vocab_size, {t for one in trained for t in one.greedy}
    answer = run_genai(
        target.folder,
        [(one.case.name, one.case.file) for one in trained],
        library=name.endswith("+irq"),
        tokens=tokens,
        prompt=trained[0].prompt,
        greedy=len(trained[0].greedy),
        texts=[(one.text, one.add_special) for one in samples],
        never=next(token for token in range(vocab) if token not in expected_tokens),
        threads=threads,
    )
    yield _genai_tokens_check(name, samples, answer.encoded)
    for one, logits, found in zip(trained, answer.logits, answer.greedy, strict=True):
        yield _logits_check(name, one, logits, tokens, exact=exact)
        if one.greedy:
            yield _greedy_check(name, one, found, exact=exact)


def _logits_check(
    name: str, one: _Trained, logits: NDArray[np.floating], tokens: NDArray[np.integer], *, exact: bool
) -> Check:
    metrics = compare(one.logits, logits, tokens)
    return nmse_check(f"{name} against {one.name}", metrics, FLOAT32_NMSE if exact else LOSSY_NMSE)


def _greedy_check(name: str, one: _Trained, found: list[int], *, exact: bool) -> Check:
    pairs = zip(one.greedy, found, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.greedy), len(found)))
    return Check(
        "greedy",
        f"{name} against {one.name}",
        same == len(one.greedy) if exact else None,
        f"{same} of {len(one.greedy)} tokens equal",
        {"tokens": found, "expected": one.greedy},
    )


def _genai_tokens_check(name: str, samples: Sequence[Sample], got: Sequence[list[int]]) -> Check:
    """Compare genai's tokenizer, which reads the same files in its own way.

    It takes other characters than Hugging Face for numerals (½ in SmolLM's pre-tokenizer), which no file can
    mend: lines of ASCII decide, the others are reported.
    """
    encoded = iter(got)
    check = tokens_check(name, samples, lambda text, add_special: next(encoded))
    passed = all(not samples[i].text.isascii() for i in check.values["different_lines"])
    return replace(check, passed=passed, gate="lines of ASCII equal")
