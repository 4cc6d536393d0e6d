"""The parent's side of a llama.cpp server in a child process: start it, ask it, tell how it died.

Native code may abort or meet an illegal instruction. In a process of its own it takes nothing with it,
and its last words become part of an ordinary error.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from irq_formats.errors import IrqError, UnsupportedModel

__all__ = ["Request", "ServerProcess"]

_ERRORS, _INFO = 1, 3  # llama.cpp's log levels
_LOG_STAMP = re.compile(r"^[\d.]+ [A-Z] ")


@dataclass(frozen=True)
class Request:
    """One HTTP request; the content is sent as JSON."""

    method: str
    path: str
    content: Any = None


class ServerProcess:
    """A running :mod:`irq_export.parity.llamacpp_server`, reached over loopback.

    Args:
        settings: What the child reads: model, lora, lora_scale, threads, ctx.
        timeout: Seconds to wait for one answer.
        verbose: Let llama.cpp's log through to stderr; else it is kept for error messages.

    Attributes:
        version: Version of the wheel.
        features: The instruction sets that llama.cpp was built with.

    Raises:
        UnsupportedModel: llama.cpp refuses the model or the adapter, or dies of it.
    """

    def __init__(self, settings: dict[str, Any], *, timeout: float, verbose: bool) -> None:
        self._timeout = timeout
        self._key = secrets.token_hex(16)  # no other user of the machine shall ask the server
        self._log = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115 see close()
        self._process = _start_child(self._log)
        private = {"key": self._key, "verbosity": _INFO if verbose else _ERRORS}
        try:
            ready = self._handshake(settings | private)
        except BaseException:
            self.close()
            raise
        self._address = urlsplit(ready["address"])
        self.version: str = ready["version"]
        self.features: str = ready["features"].strip()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def close(self) -> None:
        """End the child process; harmless when repeated."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()

    def ask(self, request: Request) -> Any:
        """Return the answer to one request.

        Raises:
            IrqError: The server refuses the request or does not answer.
        """
        [answer] = self.ask_all([request])
        return answer

    def ask_all(self, requests: Iterable[Request]) -> Iterator[Any]:
        """Yield the answers in order; while the caller digests one, the server computes the next.

        Raises:
            IrqError: The server refuses a request or does not answer.
        """
        host, port = self._address.hostname or "", self._address.port
        with closing(http.client.HTTPConnection(host, port, timeout=self._timeout)) as connection:
            body = None
            for request in requests:
                self._send(connection, request)
                if body is not None:
                    yield json.loads(body)
                body = self._receive(connection, request.path)
            if body is not None:
                yield json.loads(body)

    def _send(self, connection: http.client.HTTPConnection, request: Request) -> None:
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            connection.request(request.method, request.path, json.dumps(request.content), headers)
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(request.path, error) from error

    def _receive(self, connection: http.client.HTTPConnection, path: str) -> bytes:
        try:
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(path, error) from error
        if response.status != http.client.OK:
            message = body.decode("utf-8", "replace")[:500]
            raise IrqError("llama.cpp refuses the request", where=path, got=message)
        return body

    def _no_answer(self, path: str, error: Exception) -> IrqError:
        return IrqError(
            f"llama.cpp does not answer ({self._obituary()})",
            where=path,
            got=self._last_words() or repr(error),
        )

    def _handshake(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Hand the settings to the child and wait until its server is ready."""
        stdin, stdout = self._process.stdin, self._process.stdout
        line = ""
        if stdin is not None and stdout is not None:
            try:
                stdin.write(json.dumps(settings) + "\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            raise UnsupportedModel(
                f"llama.cpp could not load it ({self._obituary()})",
                where=settings["model"],
                got=self._last_words() or None,
            )
        ready: dict[str, Any] = json.loads(line)
        return ready

    def _obituary(self) -> str:
        """How the child ended, in words."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "its process is alive"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _last_words(self) -> str:
        """The end of llama.cpp's error log, without its time stamps."""
        if self._log is None:
            return ""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        return "; ".join(_LOG_STAMP.sub("", line) for line in text.splitlines() if line)[-1000:]


def _start_child(log: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["GGML_NO_BACKTRACE"] = "1"  # else an abort starts a debugger
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # spinning starves a shared machine
    return subprocess.Popen(
        [sys.executable, "-m", "irq_export.parity.llamacpp_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        start_new_session=True,  # Ctrl-C is the parent's; the child ends with its stdin
    )
