"""From a file and a prompt to text: the library function behind ``irq-export run``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.gguf import open_gguf
from irq_formats.gguf.pair import model_files
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model
from irq_runtime.sampling import SamplingParams, StepModel, generate
from irq_runtime.text_stream import TextStream
from irq_runtime.tokenizer import load_tokenizer

__all__ = ["RUNTIMES", "Completion", "complete"]

#: What ``runtime`` may be. ``auto`` is native, or reference for tensor types the engine lacks.
RUNTIMES = ("auto", "native", "reference")


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        prompt_tokens: Ids the model read.
        tokens: Ids it generated, without a stop token.
        text: Their text, ended before a stop string.
        finish_reason: ``stop`` (a stop token or string) or ``length``.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str


def complete(
    *,
    model: str | Path,
    prompt: str,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    runtime: str = "auto",
    mode: str = "exact",
    threads: int = 2,
    dtype: str = "float32",
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """Continue a prompt.

    Args:
        model: GGUF of the irq or a stock profile, with a tokenizer; or the directory of a stock pair.
        prompt: Text; with ``chat`` the message of the user.
        adapter: Separate adapter file.
        adapter_scale: Its multiplier.
        max_tokens: Tokens at most.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        repetition_penalty: 1 is off.
        seed: Of the sampler.
        stop: Strings that end the text.
        chat: Render the prompt with the file's chat template.
        system: With ``chat``, the system's message before it.
        runtime: One of :data:`RUNTIMES`.
        mode: Of the native engine: ``exact`` or ``fast``.
        threads: Of the native engine.
        dtype: Of the reference: ``float32`` or ``float64``.
        on_text: Called with each piece of text when it is certain.

    Raises:
        IrqError: The file, the adapter or an option is refused.
    """
    if system is not None and not chat:
        raise UsageError("a system message belongs to a chat", hint="Ask for the chat template too")
    model, adapter = model_files(model, adapter)
    tokenizer = load_tokenizer(open_gguf(model))
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_tokens=tokenizer.stop_tokens,
    )
    if chat:
        opening = [] if system is None else [{"role": "system", "content": system}]
        rendered = tokenizer.render_chat([*opening, {"role": "user", "content": prompt}])
        ids = tokenizer.encode(rendered, add_special=False)
    else:
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.bos is not None:
            ids = [tokenizer.bos]
    if not ids:
        raise UsageError("the prompt is empty", hint="Give some text with -p")
    session = _open_session(
        model, adapter, adapter_scale, runtime, mode, threads, dtype, context=len(ids) + max_tokens
    )
    stream = TextStream(tokenizer, ids, stop)
    tokens: list[int] = []
    pieces: list[str] = []

    def take(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    for token in generate(session, ids, params):
        tokens.append(token)
        take(stream.push(token))
        if stream.stopped:
            break
    take(stream.finish())
    reason = "stop" if stream.stopped or len(tokens) < max_tokens else "length"
    return Completion(ids, tokens, "".join(pieces), reason)


def _open_session(
    model: str | Path,
    adapter: str | Path | None,
    adapter_scale: float,
    runtime: str,
    mode: str,
    threads: int,
    dtype: str,
    context: int,
) -> StepModel:
    """Return an empty context of the runtime asked for."""
    if runtime not in RUNTIMES:
        raise UsageError("unknown runtime", expected=" | ".join(RUNTIMES), got=runtime)
    if runtime != "reference":
        try:
            return Engine(
                model, adapter, adapter_scale, threads=threads, mode=mode, context=context
            ).session()
        except UnsupportedModel:
            if runtime == "native":
                raise
    return load_model(model, adapter, adapter_scale).session(dtype)
