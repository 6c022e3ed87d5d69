"""Answer every exception in the one shape of errors."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match
from starlette.types import Scope

from server.api.errors import CLIENT_CLOSED_REQUEST, NOT_READY, ApiError, client_closed, from_engine
from server.api.state import app_state, request_state
from server.engine.errors import EngineError
from server.paths import SDAPI

# Those that any route has; HEAD is answered as GET.
METHODS = ("GET", "HEAD", "POST", "DELETE")


def error_response(error: ApiError, request: Request) -> Response:
    """Return the error's answer; count it and note its code for the access log."""
    request_state(request).error_code = error.code
    unavailable = error.status == HTTPStatus.SERVICE_UNAVAILABLE
    rejected = error.status < CLIENT_CLOSED_REQUEST or unavailable
    if rejected and error.code != NOT_READY:
        app_state(request).metrics.rejected.labels(error.code).inc()
    return error.response()


def register_error_handlers(app: FastAPI) -> None:
    """Make the app answer every exception in the one shape of errors."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, request)

    async def on_engine_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineError)
        return error_response(from_engine(error), request)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        message = f"{status.phrase}: {request.method} {request.url.path[:200]}"
        path = f"/v1{request.scope['path']}"
        if request.method in methods_of(app, {**request.scope, "path": path}):
            message += f"; did you mean {path}?"
        if status == HTTPStatus.NOT_FOUND and _is_switched_off(request):
            message += "; AUTOMATIC1111's API is off, and PAELLERA_SDAPI=true switches it on"
        headers = dict(error.headers or {})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(methods_of(app, request.scope))
        api_error = ApiError(status, status.name.lower(), message, headers=headers)
        return error_response(api_error, request)

    async def on_disconnect(request: Request, _: Exception) -> Response:
        # Only a reader of the body gets this exception.
        app_state(request).metrics.cancelled.labels("upload").inc()
        return error_response(client_closed(), request)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def _is_switched_off(request: Request) -> bool:
    is_sdapi = request.url.path.startswith(SDAPI)
    return is_sdapi and not app_state(request).settings.sdapi


def methods_of(app: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of a request's path; of its routes each knows only its own."""

    def exists(method: str) -> bool:
        other = {**scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(other)[0] == Match.FULL for route in app.routes)

    return [method for method in METHODS if exists(method)]
