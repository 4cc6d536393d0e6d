"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from irq_formats.errors import IrqError
from irq_runtime.serve.errors import error_document, error_response
from irq_runtime.serve.flight import Flight
from irq_runtime.serve.generation import Generation
from irq_runtime.serve.guard import Guard
from irq_runtime.serve.replies import ChatFormat, CompletionFormat, Format
from irq_runtime.serve.requests import ChatRequest, CompletionRequest
from irq_runtime.serve.requests import Request as Fields
from irq_runtime.serve.service import Service

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """Return the application; it closes the service's scheduler when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.scheduler.close)

    app = FastAPI(
        title="irq-export serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_middleware(Guard, options=service.options)
    app.add_exception_handler(IrqError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)  # a bug; its traceback goes to the log
    name = service.options.model_name

    @app.get("/health")
    async def health() -> Response:
        load = service.scheduler.load()
        state = {"status": load.state, "running": load.running, "waiting": load.waiting}
        return JSONResponse(state, 200 if load.state == "ok" else 503)

    model = {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "irq-export",
        "context": service.context,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> Response:
        service.check_model(asked)
        return JSONResponse(model)

    @app.post("/v1/completions")
    async def completions(fields: CompletionRequest, request: Request) -> Response:
        generations = await asyncio.to_thread(service.completion, fields)
        return await _reply(service, request, fields, generations, CompletionFormat(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(fields: ChatRequest, request: Request) -> Response:
        generations = await asyncio.to_thread(service.chat, fields)
        return await _reply(service, request, fields, generations, ChatFormat(name))

    return app


class _FlightResponse(StreamingResponse):
    """A stream that cancels its generations when it ends, however it ends."""

    def __init__(self, flight: Flight, form: Format, *, with_usage: bool) -> None:
        super().__init__(
            flight.stream(form, with_usage=with_usage),
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
        self._flight = flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._flight.cancel()


async def _reply(
    service: Service, request: Request, fields: Fields, generations: Sequence[Generation], form: Format
) -> Response:
    flight = Flight(service.scheduler, generations, fields.n)
    if fields.stream:
        return _FlightResponse(flight, form, with_usage=fields.wants_usage)
    watch = asyncio.create_task(_cancel_on_disconnect(request, flight))
    try:
        return JSONResponse(await flight.whole(form))
    finally:
        watch.cancel()
        flight.cancel()


async def _cancel_on_disconnect(request: Request, flight: Flight) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    flight.cancel()


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Name the first field that is wrong, without repeating what was sent."""
    if not isinstance(error, RequestValidationError):
        raise error
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return JSONResponse(error_document(400, "the body is not JSON"), 400)
    path = [part for part in map(str, fault["loc"][1:]) if "[" not in part]  # without the names of types
    message = ": ".join([".".join(path), fault["msg"]] if path else [fault["msg"]])
    if isinstance(error.body, bytes):  # not parsed
        message = "Content-Type: application/json is needed"
    return JSONResponse(error_document(400, message, param=path[0] if path else None), 400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse(
        error_document(error.status_code, str(error.detail)), error.status_code, error.headers
    )
