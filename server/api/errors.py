"""Error answers in the one shape clients see: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import Response
from fastapi.responses import JSONResponse

from server.engine.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    Draining,
    EngineError,
    JobFailed,
    QueueFull,
    Starting,
    WorkerLost,
)

CLIENT_CLOSED_REQUEST = 499
# Seconds that replacing a worker, or this server, takes.
REPLACEMENT_S = 5
# The code of a failed /readyz probe, which is not a rejected request.
NOT_READY = "not_ready"


class _Shortened(reprlib.Repr):
    def repr_bytes(self, sent: bytes, _: int) -> str:
        return f"{len(sent)} bytes"

    def repr1(self, sent: object, level: int) -> str:
        if sent is None or isinstance(sent, bool | float):
            return json.dumps(sent)
        return super().repr1(sent, level)


_shortened = _Shortened()
_shortened.maxstring = _shortened.maxother = 80


def shortened(sent: object) -> str:
    """Return a value as messages show it: as in JSON, a file by its size, a long text cut."""
    return _shortened.repr(sent)


class ClientStalledError(Exception):
    """The client did not take its answer in time; its connection was aborted."""


class ApiError(Exception):
    """An error answer.

    Attributes:
        status: HTTP status.
        code: stable identifier for programs.
        message: explanation for people.
        param: the request's field at fault, if one is.
        headers: extra headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, str | None]:
        """The object under `error`."""
        return {"message": self.message, "type": self._type, "param": self.param, "code": self.code}

    def response(self) -> Response:
        """Return the error as a JSON response."""
        return JSONResponse({"error": self.body}, self.status, self.headers)

    @property
    def _type(self) -> str:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def client_closed() -> ApiError:
    """Return the error of a client that disconnected; only the log and the metrics show it."""
    message = "the client closed the connection"
    return ApiError(CLIENT_CLOSED_REQUEST, "client_closed", message)


def cancelled() -> ApiError:
    """Return the error of a request that was deleted while its client waited for it."""
    return ApiError(CLIENT_CLOSED_REQUEST, "cancelled", "the request was cancelled")


def invalid_value(param: str, allowed: str, sent: object) -> ApiError:
    """Return the error for a field whose value is not allowed. allowed: the values that are."""
    return unprocessable("invalid_value", param, f"{allowed} (sent: {shortened(sent)})")


def unprocessable(code: str, param: str, problem: str) -> ApiError:
    """Return error 422 about a field. problem: explanation, without the field's name."""
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, code, f"{param}: {problem}", param)


def as_bad_request(error: ApiError) -> ApiError:
    """Return the error for OpenAI's clients: they know 400 for a field at fault, and not 422."""
    if error.status != HTTPStatus.UNPROCESSABLE_ENTITY:
        return error
    return ApiError(HTTPStatus.BAD_REQUEST, error.code, error.message, error.param, error.headers)


def from_engine(error: EngineError) -> ApiError:
    """Return the HTTP error for an engine error."""
    match error:
        case QueueFull(retry_after=seconds):
            answer = _too_many("queue_full", str(error), None, retry_headers(seconds))
        case DeadlineUnreachable(retry_after=seconds, retryable=retryable):
            headers = retry_headers(seconds) | _no_retry(retryable)
            answer = _too_many("deadline_unreachable", str(error), "timeout_s", headers)
        case Starting():
            answer = _unavailable("starting", f"no worker is ready: {error}")
        case Draining():
            answer = _unavailable("draining", str(error))
        case WorkerLost():
            message = "the worker was lost while it processed this request; try again"
            answer = _unavailable("worker_lost", message)
        case DeadlineExceeded():
            message = "timeout_s passed before the answer was ready"
            status = HTTPStatus.GATEWAY_TIMEOUT
            answer = ApiError(status, "deadline_exceeded", message, "timeout_s")
        case JobFailed(code=code, retryable=retryable):
            # The worker's message may hold paths and addresses: the log has it, the answer not.
            message = "the worker could not generate the image"
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            answer = ApiError(status, code, message, headers=_no_retry(retryable))
        case _:
            answer = internal_error()
    return answer


def reason(error: Exception) -> str:
    """Return the exception's text without Python's advice to its programmers."""
    text = str(error)
    if "set_int_max_str_digits" in text:
        return "a number has too many digits"
    return text


def too_many_connections() -> ApiError:
    """Return the error for a connection beyond the server's bound, before any request."""
    return _unavailable("too_many_connections", "the server has too many open connections")


def retry_headers(seconds: float) -> dict[str, str]:
    """Return the headers that tell the client to retry after this many seconds."""
    milliseconds = math.ceil(seconds * 1000)
    return {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(milliseconds)}


def internal_error() -> ApiError:
    """Return the error for an unhandled exception; a retry would meet the same bug."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal",
        "internal error; the log has the details under the request id",
        headers=_no_retry(retryable=False),
    )


def _no_retry(retryable: bool) -> dict[str, str]:
    return {} if retryable else {"x-should-retry": "false"}


def _too_many(code: str, message: str, param: str | None, headers: dict[str, str]) -> ApiError:
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, code, message, param, headers)


def _unavailable(code: str, message: str) -> ApiError:
    headers = retry_headers(REPLACEMENT_S)
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, code, message, headers=headers)
