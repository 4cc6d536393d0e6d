"""A server in a thread of the test's process, on a free loopback port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from irq_runtime.engine import Engine
from irq_runtime.serve.app import create_app
from irq_runtime.serve.options import ServeOptions
from irq_runtime.serve.server import open_service


@contextmanager
def running_server(model: Path, options: ServeOptions) -> Iterator[str]:
    """Yield the address of a server of ``model``; it has ended when the context has."""
    service = open_service(Engine(model, threads=1), model, options)
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
