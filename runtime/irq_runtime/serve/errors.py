"""Refusals that only a server knows, and how errors look in OpenAI's protocol."""

from __future__ import annotations

import logging

from fastapi.responses import JSONResponse

from irq_formats.errors import IrqError, UsageError

__all__ = [
    "BadHost",
    "BodyTooLarge",
    "NoSuchModel",
    "NotAuthorized",
    "PromptTooLong",
    "QueueFull",
    "SlowRequest",
    "Stopping",
    "error_body",
    "error_document",
    "error_response",
]

Json = dict[str, object]

_LOG = logging.getLogger("uvicorn.error")  # where the server's own messages go


class NotAuthorized(IrqError):
    """The key is missing or wrong."""

    code = "invalid_api_key"


class BadHost(IrqError):
    """The Host header names another machine: a page in a browser plays tricks with DNS."""

    code = "bad_host"


class NoSuchModel(IrqError):
    """Another model is served."""

    code = "model_not_found"


class SlowRequest(IrqError):
    """The body did not arrive in time."""

    code = "request_timeout"


class BodyTooLarge(IrqError):
    """The body exceeds the limit."""

    code = "body_too_large"


class PromptTooLong(IrqError):
    """The prompt exceeds the limit."""

    code = "context_length_exceeded"


class QueueFull(IrqError):
    """As many requests wait as may."""

    code = "queue_full"


class Stopping(IrqError):
    """The server is ending, or its engine has failed."""

    code = "unavailable"


_STATUS: dict[type[IrqError], int] = {
    UsageError: 400,
    PromptTooLong: 400,
    NotAuthorized: 401,
    BadHost: 403,
    NoSuchModel: 404,
    SlowRequest: 408,
    BodyTooLarge: 413,
    QueueFull: 429,
    Stopping: 503,
}


def _kind(status: int) -> str:
    """Return OpenAI's ``type`` for a status."""
    named = {401: "authentication_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_document(status: int, message: str, *, code: str | None = None, param: str | None = None) -> Json:
    """Return the JSON document of an error."""
    return {"error": {"message": message, "type": _kind(status), "param": param, "code": code}}


def error_body(error: IrqError) -> Json:
    """Return the JSON document of an error; what is wrong with the server is told to its log only."""
    status = _STATUS.get(type(error), 500)
    if status == 500:
        _LOG.error("request failed: %s", error)
    message = "the model could not be run" if status == 500 else str(error)
    return error_document(status, message, code=error.code)


def error_response(error: Exception) -> JSONResponse:
    """Return the reply to a request that failed."""
    if not isinstance(error, IrqError):
        closing = {"Connection": "close"}  # as uvicorn does when the application raises
        return JSONResponse(error_document(500, "internal error"), 500, closing)
    status = _STATUS.get(type(error), 500)
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return JSONResponse(error_body(error), status, headers)
