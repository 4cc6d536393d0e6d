"""The levels of a verification below the logits: container, tokenizer and template, greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from irq_export.parity.report import Check
from irq_export.parity.runtimes import LlamaCppRuntime, Runtime
from irq_export.parity.target import Target
from irq_formats.errors import IrqError
from irq_formats.gguf.reader import GgufFile
from irq_runtime.tokenizer import load_tokenizer

__all__ = ["corpus", "greedy_level", "tokenizer_level"]

_CHAT = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "Is 2 + 2 = 4?"},
]


def corpus() -> list[str]:
    """Return the fixed lines that both tokenizers encode."""
    text = (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8")
    return text.splitlines()


def tokenizer_level(target: Target, checkpoint: Path, llama: LlamaCppRuntime | None) -> Iterator[Check]:
    """Compare token ids of the corpus, and the rendered chat template, with the checkpoint's tokenizer.

    Args:
        target: The export.
        checkpoint: Directory with the tokenizer as trained.
        llama: A running llama.cpp that has the export loaded, or None.
    """
    from transformers import AutoTokenizer

    trained = AutoTokenizer.from_pretrained(checkpoint)
    lines = [*corpus(), "\n".join(corpus()[:3])]
    expected = [trained(line)["input_ids"] for line in lines]
    ours = load_tokenizer(target.gguf)
    yield _same_tokens("file", lines, expected, [ours.encode(line) for line in lines])
    decoded = [ours.decode(ids) == trained.decode(ids, skip_special_tokens=True) for ids in expected]
    yield Check("tokenizer", "decoding", all(decoded), f"{sum(decoded)} of {len(lines)} lines equal")
    if llama is not None:
        yield _same_tokens("llama.cpp", lines, expected, [llama.tokenize(line) for line in lines])
    if trained.chat_template:
        yield _same_template(target.gguf, trained.apply_chat_template)


def _same_tokens(name: str, lines: list[str], expected: list[list[int]], got: list[list[int]]) -> Check:
    wrong = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    detail = f"{len(lines) - len(wrong)} of {len(lines)} lines equal"
    if wrong:
        detail += f"; first difference in line {wrong[0] + 1}: {lines[wrong[0]]!r:.60}"
    return Check("tokenizer", f"{name} against checkpoint", not wrong, detail, {"different_lines": wrong})


def _same_template(gguf: GgufFile, apply: object) -> Check:
    tokenizer = load_tokenizer(gguf)
    for chat in (_CHAT, _CHAT[1:]):
        try:
            expected = apply(chat, tokenize=False, add_generation_prompt=True)  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001  a template may refuse a system message: then so must ours
            expected = error
        try:
            got: object = tokenizer.render_chat(chat)
        except IrqError as error:
            got = error
        if isinstance(expected, Exception) and isinstance(got, Exception):
            continue
        if expected != got:
            return Check("tokenizer", "chat template", False, f"expected {expected!r:.80}, got {got!r:.80}")
    return Check("tokenizer", "chat template", True, "rendered alike")


def greedy_level(
    trained: Runtime, runtime: Runtime, prompt: Sequence[int], count: int, *, exact: bool
) -> Check:
    """Compare greedy continuations, token by token.

    Args:
        trained: The PyTorch model.
        runtime: What runs the export.
        prompt: Tokens to continue.
        count: Tokens to generate.
        exact: Whether a difference fails (kernels that round to 8 bits may tip a near tie).
    """
    expected = trained.greedy(prompt, count)
    got = runtime.greedy(prompt, count)
    if not exact:  # llama.cpp ends at a stop token
        expected = expected[: len(got)]
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    return Check(
        "greedy",
        f"{runtime.name} against {trained.name}",
        same == len(expected) if exact else None,
        f"{same} of {len(expected)} tokens equal",
        {"tokens": got, "expected": expected},
    )
