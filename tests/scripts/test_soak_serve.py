"""``scripts/soak_serve.py`` sees what is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

GOOD = b'{"choices": [{"text": "a", "logprobs": null}], "usage": {"completion_tokens": 1}}'


class Server(ThreadingHTTPServer):
    """Answers every request with the same bytes."""

    status, body = 200, GOOD


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "body"), [(500, GOOD), (200, b"no JSON"), (200, b"null")])
def test_broken_replies_are_wrong_and_end_no_client(server: Server, status: int, body: bytes) -> None:
    from soak_serve import KINDS, Soak

    soak = Soak(f"http://127.0.0.1:{server.server_port}", 0.3, 4)
    server.status, server.body = status, body
    soak.client(seed=0)  # an error would come out of here
    assert len(soak.wrong) > len(KINDS)


def test_expected_replies_must_be_granted(server: Server) -> None:
    from soak_serve import Soak

    server.status = 500
    with pytest.raises(httpx.HTTPStatusError):
        Soak(f"http://127.0.0.1:{server.server_port}", 0.3, 4)


def test_growth_needs_two_halves() -> None:
    from soak_serve import growth

    assert [growth([9] * count) for count in range(4)] == [None] * 4
    assert growth([1, 5, 5, 8, 8]) == 3
