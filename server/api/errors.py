"""Every way a request can go wrong, in the one shape clients see: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api.state import state_of
from server.engine.errors import DeadlineExceeded, DeadlineUnreachable, Draining, EngineError, JobFailed, QueueFull, Starting, WorkerLost

CLIENT_CLOSED_REQUEST = 499
# A worker is replaced, and this server by another one, in about as many.
REPLACED_S = 5
# What a probe of /readyz is told, which has refused nobody.
NOT_READY = "not_ready"

# Of pydantic's and our own types of complaint, those with codes of their own.
CODES = {"missing": "missing_field", "picture_url": "url_refused"}


class _Shortened(reprlib.Repr):
    def repr_bytes(self, sent: bytes, _: int) -> str:
        return f"{len(sent)} bytes"


_shortened = _Shortened()
_shortened.maxstring = _shortened.maxother = 80


class ApiError(Exception):
    """An error answer. param: the request's field that is to blame; code: stable, for programs; message: for people."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, str | None]:
        """What stands under `error`."""
        return {"message": self.message, "type": self._type, "param": self.param, "code": self.code}

    def response(self) -> Response:
        return JSONResponse({"error": self.body}, self.status, self.headers)

    @property
    def _type(self) -> str:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def client_closed() -> ApiError:
    """The client went away; this answer reaches the log and the metrics only."""
    return ApiError(CLIENT_CLOSED_REQUEST, "client_closed", "the client closed the connection")


def cancelled() -> ApiError:
    """Somebody deleted the request while its client still waited for it."""
    return ApiError(CLIENT_CLOSED_REQUEST, "cancelled", "the request was cancelled")


def invalid(param: str, message: str, sent: object) -> ApiError:
    """A field with a value it cannot have. message: what is allowed."""
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_value", f"{param}: {message} (sent: {_shortened.repr(sent)})", param)


def unknown_field(name: str, known: Iterable[str]) -> ApiError:
    # A client's own name for a field may hold anything, lone surrogates included.
    shown = name[:80].encode("utf-8", "backslashreplace").decode()
    message = f"{shown}: unknown field; the fields are {', '.join(known)}"
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown_field", message, shown)


def from_validation(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints, with the field named as the client wrote it."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path) or "body"
    message = f"{where}: {first['msg']}"
    if first["type"] not in ("missing", "secret"):
        message += f" (sent: {_shortened.repr(first['input'])})"
    code = CODES.get(first["type"], "invalid_value")
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, code, message, path[0] if path else None)


def from_engine(error: EngineError) -> ApiError:
    """What the engine's exceptions mean over HTTP."""
    match error:
        case QueueFull(retry_after=seconds):
            return ApiError(HTTPStatus.TOO_MANY_REQUESTS, "queue_full", str(error), headers=come_back(seconds))
        case DeadlineUnreachable(retry_after=seconds, repeating=repeating):
            headers = come_back(seconds) | ({} if repeating else {"x-should-retry": "false"})
            return ApiError(HTTPStatus.TOO_MANY_REQUESTS, "deadline_unreachable", str(error), "timeout_s", headers)
        case Starting():
            return _unavailable("starting", f"no worker is ready: {error}")
        case Draining():
            return _unavailable("draining", str(error))
        case WorkerLost():
            return _unavailable("worker_lost", "the worker was lost while it had this request; try again")
        case DeadlineExceeded():
            return ApiError(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", "timeout_s passed before the answer was ready", "timeout_s")
        case JobFailed(code=code, repeating=repeating):
            headers = {} if repeating else {"x-should-retry": "false"}
            # The worker's own words may hold paths and addresses: they are in the log, not in the answer.
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, code, "the worker could not make the picture", headers=headers)
    return internal_error()


def _unavailable(code: str, message: str) -> ApiError:
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, code, message, headers=come_back(REPLACED_S))


def come_back(seconds: float) -> dict[str, str]:
    """The headers that say when to try again."""
    return {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def internal_error() -> ApiError:
    """For what nobody foresaw: repeating the request would meet the same bug."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal",
        "an internal error; the log has it under the request id",
        headers={"x-should-retry": "false"},
    )


def refusal(error: ApiError, request: Request) -> Response:
    """The error's answer, counted, and its code kept for the request's line in the log."""
    request.state.code = error.code
    refused = error.status < CLIENT_CLOSED_REQUEST or error.status == HTTPStatus.SERVICE_UNAVAILABLE
    if refused and error.code != NOT_READY:
        state_of(request).metrics.rejected.labels(error.code).inc()
    return error.response()


def register(app: FastAPI) -> None:
    """Makes the app answer all of these in the one shape."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return refusal(error, request)

    async def refuse_engine(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineError)
        return await refuse(request, from_engine(error))

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        message = f"{status.phrase}: {request.method} {request.url.path[:200]}"
        return await refuse(request, ApiError(status, status.name.lower(), message, headers=error.headers))

    async def refuse_gone(request: Request, _: Exception) -> Response:
        return await refuse(request, client_closed())

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(ClientDisconnect, refuse_gone)
    app.add_exception_handler(EngineError, refuse_engine)
    app.add_exception_handler(HTTPException, refuse_http)
