"""A server in a thread of the test's process, on a free loopback port, and what clients do with it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from irq_runtime.engine import Engine
from irq_runtime.serve.app import create_app
from irq_runtime.serve.options import ServeOptions
from irq_runtime.serve.server import open_service
from irq_runtime.tokenizer import Tokenizer

PROMPT = "Once upon a time"
LONG = "Once upon a time there was a cat. The cat had a big red ball. One day the ball was gone. " * 3
CHUNK = 16

Json = dict[str, Any]

#: A request that takes long.
HEAVY: Json = {"prompt": PROMPT, "max_tokens": 500, "n": 16, "temperature": 1.3, "ignore_eos": True}


@contextmanager
def running_server(
    model: Path,
    options: ServeOptions,
    change: Callable[[Tokenizer], None] | None = None,
    engine: type[Engine] = Engine,
) -> Iterator[str]:
    """Yield the address of a server of ``model``; it has ended when the context has.

    Args:
        model: Its file.
        options: Of the server.
        change: Makes something else of the file's tokenizer.
        engine: Runs it.
    """
    service = open_service(engine(model, threads=1), model, options)
    if change is not None:
        change(service.tokenizer)
    config = uvicorn.Config(create_app(service), access_log=False, log_level="critical", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def client_of(
    demo: Path,
    change: Callable[[Tokenizer], None] | None = None,
    engine: type[Engine] = Engine,
    **options: Any,
) -> Iterator[httpx.Client]:
    serve_options = ServeOptions(port=0, model_name="demo", **{"chunk": CHUNK, **options})
    with (
        running_server(demo, serve_options, change, engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def post(client: httpx.Client, path: str = "completions", **body: Any) -> Json:
    reply = client.post(f"/v1/{path}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(client: httpx.Client, **body: Any) -> str:
    return post(client, **{"prompt": PROMPT, **body})["choices"][0]["text"]


def events_of(client: httpx.Client, path: str, **body: Any) -> list[Json]:
    """Documents of a stream, which must end in [DONE]."""
    with client.stream("POST", f"/v1/{path}", json={"stream": True, **body}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def is_idle(client: httpx.Client) -> bool:
    state = client.get("/health").json()
    return (state["running"], state["waiting"]) == (0, 0)
