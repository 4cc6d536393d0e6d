"""What stands before the application: host, key, and the size and pace of the body."""

from __future__ import annotations

import asyncio
import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from irq_formats.errors import IrqError
from irq_runtime.serve.errors import BadHost, BodyTooLarge, NotAuthorized, SlowRequest, error_response
from irq_runtime.serve.options import ServeOptions, is_loopback

__all__ = ["Guard"]

_PORT = re.compile(r":\d*$")


class Guard:
    """ASGI middleware that lets through whole, small requests of clients that may ask.

    A server on a loopback address answers only to loopback names: else a web page could point its own name
    at this machine and read the replies. ``/health`` needs no key.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            if scope["path"] != "/health":
                self._check_key(headers)
            try:
                body = await asyncio.wait_for(self._body(headers, receive), self._options.body_timeout_s)
            except TimeoutError:
                raise SlowRequest("the body did not arrive in time") from None
        except IrqError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host", "")
        if self._options.is_local and not is_loopback(_PORT.sub("", given).strip("[]").lower()):
            raise BadHost("unknown host", expected="a loopback name", got=given)

    def _check_key(self, headers: Headers) -> None:
        expected = self._options.api_key
        if expected is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), expected.encode()):
            raise NotAuthorized("the API key is missing or wrong", expected="Authorization: Bearer KEY")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client left."""
        limit = self._options.max_body
        too_large = BodyTooLarge("the request is too large", expected=f"at most {limit} bytes")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that gives ``body`` once, then what the client does next."""
    left = [body]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay
