"""From a file and a prompt to text: the library function behind ``irq-export run``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.gguf import open_gguf
from irq_formats.gguf.pair import model_files
from irq_runtime.engine import Engine
from irq_runtime.model_file import check_context, read_config
from irq_runtime.reference import load_model
from irq_runtime.sampling import SamplingParams, StepModel, generate
from irq_runtime.text_stream import TextStream
from irq_runtime.tokenizer import Tokenizer, load_tokenizer

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
        times: Seconds on one clock: of the start, then of every token.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    times: tuple[float, ...]

    @property
    def prompt_rate(self) -> float | None:
        """Tokens of the prompt per second, until the first new one; None if there is none."""
        return len(self.prompt_tokens) / (self.times[1] - self.times[0]) if len(self.times) > 1 else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first new one; None for fewer than two."""
        count = len(self.times) - 2
        return count / (self.times[-1] - self.times[1]) if count > 0 else None


def complete(
    *,
    model: str | Path,
    prompt: str,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    tokenizer: str | Path | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    template_variables: Mapping[str, object] | None = None,
    runtime: str = "auto",
    mode: str = "exact",
    threads: int | None = None,
    context: int | None = None,
    half_cache: bool = False,
    dtype: str = "float32",
    on_text: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Completion:
    """Continue a prompt.

    Args:
        model: GGUF of the irq or a stock profile; or the directory of a stock pair.
        prompt: Text; with ``chat`` the message of the user.
        adapter: Separate adapter file.
        adapter_scale: Its multiplier.
        tokenizer: ``tokenizer.json`` or Hugging Face directory, for a file without a tokenizer.
        max_tokens: Tokens at most; -1: until the text ends. It also ends where the context does.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        repetition_penalty: Of tokens seen, the prompt's too; 1 is off.
        frequency_penalty: Of generated tokens, each time; 0 is off.
        presence_penalty: Of generated tokens, once; 0 is off.
        seed: Of the sampler; -1 takes another each time.
        stop: Strings that end the text.
        chat: Render the prompt with the file's chat template.
        system: With ``chat``, the system's message before it.
        template_variables: With ``chat``, further variables of the template, such as ``enable_thinking``.
        runtime: One of :data:`RUNTIMES`.
        mode: Of the native engine: ``exact`` or ``fast``.
        threads: Of the native engine; None: the cores of this machine.
        context: Tokens of prompt and reply together at most; None: what the model was trained for.
        half_cache: The native engine keeps keys and values in fp16.
        dtype: Of the reference: ``float32`` or ``float64``.
        on_text: Called with each piece of text when it is certain.
        on_note: Called with what the user should know, such as that ``auto`` means the slow reference here.

    Raises:
        IrqError: The file, the adapter or an option is refused.
    """
    if runtime not in RUNTIMES:
        raise UsageError("unknown runtime", expected=" | ".join(RUNTIMES), got=runtime)
    if dtype != "float32" and runtime != "reference":
        raise UsageError(
            f"only the reference computes in {dtype}", got=runtime, hint="Choose the reference runtime"
        )
    if runtime == "reference" and (mode != "exact" or half_cache):
        raise UsageError(
            "the reference is exact, and its cache is of its dtype",
            got=f"mode {mode}, half_cache {half_cache}",
            hint="Choose the native runtime",
        )
    if not chat and (system is not None or template_variables):
        raise UsageError(
            "a system message and variables of the template belong to a chat",
            hint="Ask for the chat template too",
        )
    model, adapter = model_files(model, adapter)
    gguf = open_gguf(model)
    text_tokenizer = load_tokenizer(gguf, tokenizer)
    positions = check_context(read_config(gguf), context)
    if chat:
        opening = [] if system is None else [{"role": "system", "content": system}]
        messages = [*opening, {"role": "user", "content": prompt}]
        rendered = text_tokenizer.render_chat(messages, variables=template_variables)
        ids = text_tokenizer.encode(rendered, add_special=False)
    else:
        ids = _read_prompt(text_tokenizer, prompt)
    if not ids:
        raise UsageError("the prompt is empty", hint="Give some text with -p")
    room = positions - len(ids)
    if room < 1:
        raise UsageError(
            "the prompt fills the context", expected=f"at most {positions - 1} tokens", got=len(ids)
        )
    params = SamplingParams(
        max_tokens=room if max_tokens == -1 else min(max_tokens, room),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=secrets.randbits(32) if seed == -1 else seed,
        stop_tokens=text_tokenizer.stop_tokens,
    )

    def native() -> StepModel:
        return Engine(
            model,
            adapter,
            adapter_scale,
            threads=threads,
            mode=mode,
            context=len(ids) + params.max_tokens,
            half_cache=half_cache,
        ).session()

    def reference() -> StepModel:
        return load_model(model, adapter, adapter_scale).session(dtype)

    session = _open_session(runtime, native, reference, on_note or (lambda note: None))
    stream = TextStream(text_tokenizer, ids, stop)
    tokens: list[int] = []
    pieces: list[str] = []
    times = [time.perf_counter()]  # of the start, then of every token

    def take(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    for token in generate(session, ids, params):
        times.append(time.perf_counter())
        tokens.append(token)
        take(stream.push(token))
        if stream.stopped:
            break
    take(stream.finish())
    reason = "stop" if stream.stopped or len(tokens) < params.max_tokens else "length"
    return Completion(ids, tokens, "".join(pieces), reason, tuple(times))


def _read_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a text; of an empty one BOS, if the model has it."""
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos is not None:
        return [tokenizer.bos]
    return ids


def _open_session(
    runtime: str,
    native: Callable[[], StepModel],
    reference: Callable[[], StepModel],
    note: Callable[[str], None],
) -> StepModel:
    """Return an empty context of the runtime asked for."""
    if runtime == "reference":
        return reference()
    try:
        return native()
    except UnsupportedModel as error:
        if runtime == "native":
            raise
        note(f"{error}. The reference runtime, in numpy, runs instead: it is slow")
        return reference()
