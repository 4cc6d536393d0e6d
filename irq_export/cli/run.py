"""``irq-export run``: generate text from a GGUF file, without torch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from irq_export.cli.common import console, emit, json_option, threads_option, tokenizer_option, verb
from irq_formats.errors import MalformedFile, UsageError
from irq_formats.strict_json import parse_object

if TYPE_CHECKING:
    from irq_runtime.completion import Completion

__all__ = ["command"]


@click.command(short_help="Generate text from a GGUF file.")
@click.argument("model", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Text to continue; with --chat, the user's message.")
@click.option(
    "-f",
    "--file",
    type=click.File(encoding="utf-8"),
    help="Read the prompt from here, without the newline at its end; - is stdin.",
)
@click.option("--adapter", type=click.Path(path_type=Path), help="Separate adapter file.")
@click.option("--adapter-scale", type=float, default=1.0, show_default=True, help="Its multiplier.")
@tokenizer_option
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(-1),
    default=128,
    show_default=True,
    help="Tokens at most; -1: until the text ends.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep k tokens; 0 keeps all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep this much probability.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Drop below min-p x the likeliest.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1 avoids tokens seen, those of the prompt too.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Above 0 avoids generated tokens, each time more.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Above 0 avoids generated tokens.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler; -1: another each time.")
@click.option("--stop", multiple=True, help="End before this text; may be given again.")
@click.option("--chat", is_flag=True, help="Render the prompt with the file's chat template.")
@click.option("--system", help="With --chat, the system's message before it.")
@click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    help="With --chat, further variables of the template, such as '{\"enable_thinking\": false}'.",
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "native", "reference"]),
    default="auto",
    show_default=True,
    help="auto: native, or reference for tensor types native lacks.",
)
@click.option(
    "--mode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True, help="Of native."
)
@threads_option
@click.option(
    "-c",
    "--context",
    type=click.IntRange(2),
    help="Tokens of prompt and reply at most (default: the model's).",
)
@click.option("--half-cache", is_flag=True, help="Native keeps keys and values in fp16.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="Of reference; float64 is the specification.",
)
@json_option
@verb
def command(
    model: Path,
    prompt: str | None,
    file: TextIO | None,
    adapter: Path | None,
    adapter_scale: float,
    tokenizer: Path | None,
    stop: tuple[str, ...],
    chat: bool,
    system: str | None,
    chat_template_kwargs: str | None,
    runtime: str,
    mode: str,
    threads: int,
    context: int | None,
    half_cache: bool,
    dtype: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt with FILE, a GGUF of the irq or a stock profile, or the directory of a stock pair."""
    from irq_runtime.completion import complete

    if (prompt is None) == (file is None):
        raise UsageError("one prompt is needed", expected="-p TEXT or -f FILE")
    started = time.perf_counter()
    completion = complete(
        model=model,
        prompt=_read(file) if prompt is None else prompt,
        adapter=adapter,
        adapter_scale=adapter_scale,
        tokenizer=tokenizer,
        stop=stop,
        chat=chat,
        system=system,
        template_variables=_read_variables(chat_template_kwargs),
        runtime=runtime,
        mode=mode,
        threads=threads,
        context=context,
        half_cache=half_cache,
        dtype=dtype,
        on_text=None if as_json else _write,
        on_note=_note,
        **sampling,
    )
    seconds = time.perf_counter() - started
    result = {
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seconds": round(seconds, 3),
        "prompt_tokens_per_second": completion.prompt_rate,
        "tokens_per_second": completion.decode_rate,
    }
    emit(result, "", as_json=as_json)
    if not as_json:
        _note(_speed(completion))


def _read(file: TextIO | None) -> str:
    try:
        return "" if file is None else file.read().removesuffix("\n")  # which editors leave, and echo
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not UTF-8", got=error) from error


def _read_variables(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        return parse_object(text.encode(errors="surrogateescape"), where="--chat-template-kwargs")
    except MalformedFile as error:
        raise UsageError(error.message, where=error.where, expected="a JSON object", got=error.got) from error


def _speed(completion: Completion) -> str:
    """Return a line such as ``prompt: 5 tokens, 98.1 tokens/s; reply: 40 tokens, 61.2 tokens/s``."""
    parts = (
        ("prompt", completion.prompt_tokens, completion.prompt_rate),
        ("reply", completion.tokens, completion.decode_rate),
    )
    return "; ".join(
        f"{name}: {len(tokens)} tokens" + ("" if rate is None else f", {rate:.1f} tokens/s")
        for name, tokens, rate in parts
    )


def _note(text: str) -> None:
    """Print a message on stderr."""
    console().print(text, markup=False)


def _write(text: str) -> None:
    """Stream text to stdout as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()
