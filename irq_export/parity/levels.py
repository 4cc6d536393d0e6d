"""The levels of a verification below the logits: tokenizer and template, greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from irq_export.parity.metadata import tokenizer_keys_check
from irq_export.parity.report import Check
from irq_export.parity.runtimes import LlamaCppRuntime, Runtime
from irq_export.parity.target import Target
from irq_export.parity.tokenizers import CHATS, Sample, TrainedTokenizer, tokens_check
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import IrqError
from irq_formats.files import read_small
from irq_formats.strict_json import parse_object
from irq_runtime.tokenizer import Tokenizer, load_tokenizer

__all__ = ["PROMPT_TOKENS", "greedy_level", "tokenizer_level"]

#: Tokens of the text that are continued greedily.
PROMPT_TOKENS = 8

_MAX_JSON_BYTES = 1 << 20  # of generation_config.json; they have hundreds


def tokenizer_level(target: Target, checkpoint: Checkpoint, llama: LlamaCppRuntime | None) -> Iterator[Check]:
    """Compare the file's tokenizer, its end tokens and its chat template with the checkpoint's.

    Args:
        target: The export.
        checkpoint: Holds the tokenizer as trained.
        llama: A running llama.cpp that has the export loaded, or None.

    Raises:
        MalformedFile: transformers cannot read the checkpoint's tokenizer.
    """
    trained, ours = TrainedTokenizer(checkpoint.path), load_tokenizer(target.gguf)
    samples = trained.samples()
    yield tokens_check("file", samples, ours.encode)
    yield from _auto_tokenizer(checkpoint, samples)
    decoded = [ours.decode(one.tokens) == trained.decode(one.tokens) for one in samples]
    yield Check("tokenizer", "decoding", all(decoded), f"{sum(decoded)} of {len(decoded)} lines equal")
    if llama is not None:
        yield tokens_check("llama.cpp", samples, llama.tokenize)
    yield tokenizer_keys_check(target, checkpoint)
    yield _same_ends(checkpoint, trained, ours)
    if trained.has_template:
        yield _same_template(trained, ours)


def _auto_tokenizer(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Iterator[Check]:
    """Report where transformers reads the tokenizer otherwise: adapters of others learn on that."""
    from transformers import AutoTokenizer

    try:
        auto = AutoTokenizer.from_pretrained(str(checkpoint.path), local_files_only=True)
    except Exception:  # noqa: BLE001  it raises whatever comes up; nothing depends on it
        return
    check = tokens_check(
        "AutoTokenizer",
        samples,
        lambda text, add_special: auto(text, add_special_tokens=add_special, verbose=False)["input_ids"],
    )
    if not check.passed:
        detail = f"{check.detail}: an adapter that was trained elsewhere has learnt other tokens"
        yield replace(check, passed=None, detail=detail)


def _same_ends(checkpoint: Checkpoint, trained: TrainedTokenizer, ours: Tokenizer) -> Check:
    """Compare the tokens that end a reply: those at which transformers stops, and the tokenizer's own end."""
    path = checkpoint.path / "generation_config.json"
    generation = parse_object(read_small(path, limit=_MAX_JSON_BYTES), where=path) if path.is_file() else {}
    ends = generation.get("eos_token_id")
    if ends is None:
        ends = checkpoint.config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    expected = {end for end in (*listed, trained.end) if isinstance(end, int) and 0 <= end < trained.size}
    got = set(ours.stop_tokens)
    detail = f"{len(got)} equal" if got == expected else f"expected {sorted(expected)}, got {sorted(got)}"
    return Check("tokenizer", "end tokens", got == expected, detail, {"tokens": sorted(got)})


def _same_template(trained: TrainedTokenizer, ours: Tokenizer) -> Check:
    rendered = 0
    for chat in CHATS:
        try:
            expected: object = trained.render(chat)
        except Exception as error:  # noqa: BLE001  a template may refuse a system message: then so must ours
            expected = error
        try:
            got: object = ours.render_chat(chat)
        except IrqError as error:
            got = error
        if isinstance(expected, Exception) and isinstance(got, Exception):
            continue
        if expected != got:
            return Check("tokenizer", "chat template", False, f"expected {expected!r:.80}, got {got!r:.80}")
        rendered += 1
    detail = f"{rendered} of {len(CHATS)} conversations rendered alike"
    detail += ", the others refused alike" if rendered < len(CHATS) else ""
    return Check("tokenizer", "chat template", True if rendered else None, detail)


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
