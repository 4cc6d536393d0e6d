"""``irq-export serve``: an OpenAI-compatible server over the native engine, without torch."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from irq_export.cli.common import console, emit, json_option, threads_option, tokenizer_option, verb
from irq_formats.errors import UsageError

if TYPE_CHECKING:
    from irq_runtime.serve.server import Ready

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command(short_help="Serve a GGUF file over OpenAI's protocol.")
@click.argument("model", metavar="FILE", type=_PATH)
@click.option("--adapter", type=_PATH, help="Separate adapter file.")
@click.option("--adapter-scale", type=float, default=1.0, show_default=True, help="Its multiplier.")
@tokenizer_option
@click.option(
    "--mode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True, help="Of the engine."
)
@threads_option
@click.option("-c", "--context", type=click.IntRange(2), help="Positions of a text (default: the model's).")
@click.option("--half-cache", is_flag=True, help="Keep keys and values in fp16.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes any free one.")
@click.option(
    "--api-key", envvar="IRQ_EXPORT_API_KEY", help="What clients must send [env: IRQ_EXPORT_API_KEY]."
)
@click.option("--model-name", help="Name to serve under (default: the file's).")
@click.option("--sequences", type=int, default=4, show_default=True, help="Texts decoded together.")
@click.option("--queue", type=int, default=64, show_default=True, help="Requests that may wait.")
@click.option("--max-prompt", type=int, help="Tokens of a prompt at most (default: what the context holds).")
@click.option("--max-body", type=int, default=1 << 20, show_default=True, help="Bytes of a request at most.")
@click.option(
    "--grace", "grace_s", type=float, default=20.0, show_default=True, help="Seconds to finish after SIGTERM."
)
@json_option
@verb
def command(
    model: Path,
    adapter: Path | None,
    adapter_scale: float,
    tokenizer: Path | None,
    mode: str,
    threads: int,
    context: int | None,
    half_cache: bool,
    host: str,
    port: int,
    api_key: str | None,
    model_name: str | None,
    sequences: int,
    queue: int,
    max_prompt: int | None,
    max_body: int,
    grace_s: float,
    as_json: bool,
) -> None:
    """Serve FILE, a GGUF or the directory of a stock pair, until Ctrl-C or SIGTERM.

    Endpoints: /v1/completions, /v1/chat/completions (both also as a stream), /v1/models, /health.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UsageError("serve needs FastAPI and uvicorn", hint="pip install 'irq-export[serve]'")
    from irq_runtime.serve.options import ServeOptions
    from irq_runtime.serve.server import serve

    options = ServeOptions(
        host=host,
        port=port,
        api_key=api_key,
        model_name=model_name or model.stem,
        sequences=sequences,
        queue=queue,
        max_prompt=max_prompt,
        max_body=max_body,
        grace_s=grace_s,
    )
    if not options.is_local and api_key is None:
        console().print(f"warning: anyone who reaches {host} may use the model; --api-key protects it")

    def on_ready(ready: Ready) -> None:
        emit(asdict(ready), _text(ready), as_json=as_json)

    serve(
        model=model,
        adapter=adapter,
        adapter_scale=adapter_scale,
        tokenizer=tokenizer,
        mode=mode,
        threads=threads,
        context=context,
        half_cache=half_cache,
        options=options,
        on_ready=on_ready,
    )


def _text(ready: Ready) -> str:
    return (
        f"serving {ready.model} at {ready.url}: {ready.sequences} texts of {ready.context} tokens together, "
        f"{ready.cache_bytes / 1e6:.0f} MB of cache at most; Ctrl-C stops"
    )
