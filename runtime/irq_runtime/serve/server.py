"""Opening a model and serving it until a signal: the library function behind ``irq-export serve``."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import uvicorn

from irq_formats.errors import UsageError
from irq_formats.gguf import open_gguf
from irq_formats.gguf.pair import model_files
from irq_runtime.engine import Engine
from irq_runtime.serve.app import create_app
from irq_runtime.serve.options import ServeOptions
from irq_runtime.serve.scheduler import Scheduler
from irq_runtime.serve.service import Service
from irq_runtime.tokenizer import load_tokenizer

__all__ = ["Ready", "open_service", "serve"]

#: Seconds beyond ``grace_s`` for replies to reach clients that read slowly.
_FLUSH_S = 3

#: Beyond these, connections are answered with 503: a process has only so many file descriptors.
_MAX_CONNECTIONS = 512


@dataclass(frozen=True)
class Ready:
    """A server that listens.

    Attributes:
        url: Base of the protocol.
        model: Name the model is served under.
        context: Positions a text may have.
        sequences: Texts decoded together.
        cache_bytes: Keys and values of all of them at full length.
    """

    url: str
    model: str
    context: int
    sequences: int
    cache_bytes: int


class _Server(uvicorn.Server):
    """Tells the scheduler about the signal that ends the server."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace_s: float) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._grace_s = grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the countdown; a second Ctrl-C ends at once."""
        self._scheduler.stop_after(0 if self.should_exit else self._grace_s)
        super().handle_exit(sig, frame)


def open_service(
    engine: Engine, model: str | Path, options: ServeOptions, tokenizer: str | Path | None = None
) -> Service:
    """Return the service of an open engine and its tokenizer: the file's, unless another is given.

    Raises:
        UnsupportedModel: The file carries no tokenizer.
        MalformedFile: The tokenizer is broken.
    """
    text_tokenizer = load_tokenizer(open_gguf(model), tokenizer)
    scheduler = Scheduler(
        engine, text_tokenizer, sequences=options.sequences, queue=options.queue, chunk=options.chunk
    )
    return Service(options, text_tokenizer, scheduler, engine.info.vocab_size, engine.info.context)


def serve(
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    tokenizer: str | Path | None = None,
    mode: str = "exact",
    threads: int | None = None,
    context: int | None = None,
    half_cache: bool = False,
    options: ServeOptions,
    on_ready: Callable[[Ready], None] | None = None,
) -> None:
    """Serve a model until SIGTERM or SIGINT; then running requests may end within ``options.grace_s``.

    Args:
        model: GGUF of the irq or a stock profile; or the directory of a stock pair.
        adapter: Separate adapter file.
        adapter_scale: Its multiplier.
        tokenizer: ``tokenizer.json`` or Hugging Face directory, for a file without a tokenizer.
        mode: ``exact`` or ``fast``.
        threads: Of the engine; None: the cores of this machine.
        context: Positions of a text; None: the model's own, 4096 at most.
        half_cache: Keep keys and values in fp16.
        options: Address, secret and limits.
        on_ready: Called when clients can connect.

    Raises:
        UsageError: The address is not available, or an option is out of range.
        IrqError: The file or the adapter is refused.
    """
    model, adapter = model_files(model, adapter)
    with _listen(options.host, options.port) as listener:
        engine = Engine(
            model, adapter, adapter_scale, threads=threads, mode=mode, context=context, half_cache=half_cache
        )
        options = replace(options, port=listener.getsockname()[1])
        service = open_service(engine, model, options, tokenizer)
        config = uvicorn.Config(
            create_app(service),
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=int(options.grace_s) + _FLUSH_S,
        )
        if on_ready is not None:
            on_ready(_ready(engine, options))
        _settle()
        try:
            _Server(config, service.scheduler, options.grace_s).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises the signal again when it has finished
            pass
        finally:
            service.scheduler.close()
            gc.unfreeze()  # else nothing of it is collected at the end, and nanobind reports leaks


def _settle() -> None:
    """Take what lives as long as the process out of the garbage collector's sight.

    A stream leaves cycles behind (tasks, tracebacks of cancellation). Full collections, which free them, wait
    until new objects are a quarter of the old, 61,000 after the imports, and stop the server for 70 ms.
    Without those a collection takes a millisecond, and does not wait for megabytes of garbage.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # counts again what is old: next to nothing


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            "cannot listen", where=f"{host}:{port}", got=error, hint="Choose another --host or --port"
        ) from error


def _ready(engine: Engine, options: ServeOptions) -> Ready:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return Ready(
        url=f"http://{host}:{options.port}/v1",
        model=options.model_name,
        context=engine.info.context,
        sequences=options.sequences,
        cache_bytes=options.sequences * engine.info.sequence_bytes,
    )
