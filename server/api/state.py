"""State of the app, created once, and of each request: id, log fields, cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Scope

from model.config import BundleConfig
from server.api.errors import ApiError, cancelled, client_closed
from server.api.images.admission import ImageDecoder
from server.api.images.encode_queue import ImageEncoder
from server.api.images.marking import Marker
from server.api.images.url_store import UrlStore
from server.engine.interface import Engine
from server.engine.job import Job
from server.metrics import Metrics
from server.settings import Settings

if TYPE_CHECKING:
    from server.tracing import Tracing

REQUEST_STATE = "paellera.request"
# Client name of a request without a key: the limits then hold for all such requests together.
ANYBODY = "anybody"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class AppState:
    """The state that every request handler reads.

    Attributes:
        models: configurations of the served bundles by name, the default first.
        decoder: queue and threads that decode uploaded images.
        encoder: queue and threads that encode generated images.
        url_store: generated images that clients fetch by URL.
        started_at: Unix seconds.
        running: by client and request id, the futures that end running requests with an error.
        tracing: None unless `settings.tracing` is on.
        marker: chooses what generated files say about themselves.
        stopping: set from the stop signal on; /readyz is then 503, while requests still are served.
    """

    settings: Settings
    metrics: Metrics
    engine: Engine
    models: dict[str, BundleConfig]
    decoder: ImageDecoder
    encoder: ImageEncoder
    url_store: UrlStore
    started_at: int = field(default_factory=lambda: int(time.time()))
    running: dict[tuple[str, str], list[asyncio.Future[ApiError]]] = field(default_factory=dict)
    tracing: Tracing | None = None
    marker: Marker = field(default_factory=Marker)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


async def _at_once() -> None:
    """Return."""


async def _no_answer(_: Request, __: BaseModel) -> None:
    """Return None."""


@dataclass(slots=True)
class RequestState:
    """The state of one request, shared by middleware and handlers and shown in the access log.

    Attributes:
        id: the client's `X-Request-Id`, or a generated one.
        client: name of the API key, None until the request is authenticated.
        error_code: code of the error answer, if the answer is one.
        job_fields: the job's fields for the access log, empty until there is a job.
        earlier_answer: given the request's fields, returns the answer to an earlier request that
            this one repeats, or None.
        abandoned: called when the client has left; waits until nobody else wants the answer.
    """

    id: str
    client: str | None = None
    error_code: str | None = None
    job_fields: dict[str, Any] = field(default_factory=dict)
    earlier_answer: Callable[[Request, BaseModel], Coroutine[Any, Any, Response | None]] = (
        _no_answer
    )
    abandoned: Callable[[], Coroutine[Any, Any, None]] = _at_once


def app_state(request: Request) -> AppState:
    """Return the state of the request's app."""
    return cast(AppState, request.app.state.paellera)


def add_request_state(scope: Scope, state: RequestState) -> None:
    """Attach the state to the request of this ASGI scope."""
    scope[REQUEST_STATE] = state


def request_state(scope: Request | Scope) -> RequestState:
    """Return the state of this request, or of the request of this ASGI scope."""
    return cast(RequestState, scope[REQUEST_STATE])


def owner_of(request: Request) -> str:
    """Return whose request it is: the name of its API key, or else the client's address."""
    client = request_state(request).client
    if client not in (None, ANYBODY):
        return str(client)
    return f"address {request.client.host if request.client else 'unknown'}"


def log_job(request: Request, job: Job) -> None:
    """Add the job to the request's access log line, its prompts only if the settings say so."""
    fields = {
        "job": job.id,
        "model": job.model,
        "images": len(job.seeds),
        "seed": job.seeds[0],
        "size": "{}x{}".format(*job.drawn_size),
        "steps": job.sampling.steps,
        "preset": job.sampling.preset,
    }
    if app_state(request).settings.log_prompts:
        fields |= {"prompts": job.prompts, "negative_prompt": job.negative_prompt}
    request_state(request).job_fields = fields


# ── cancellation ──────────────────────────────────────────────────────────────────────────────────


def cancel(request: Request, id: str) -> bool:
    """End the running requests of the caller's API key with this id; return whether any was."""
    running = app_state(request).running.get((request_state(request).client or "", id), [])
    for ended in running:
        if not ended.done():
            ended.set_result(cancelled())
    return bool(running)


async def unless_cancelled(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, or cancel it when the request ends first.

    Raises:
        ApiError: 499, the client disconnected or the request was deleted.
    """
    task = asyncio.create_task(work)
    running, key = app_state(request).running, _running_key(request)
    ended: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
    disconnected = asyncio.create_task(_disconnection(request))
    running.setdefault(key, []).append(ended)
    events: tuple[asyncio.Future[Any], ...] = (task, ended, disconnected)
    try:
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ended.result() if ended.done() else client_closed()
        return task.result()
    finally:
        running[key].remove(ended)
        if not running[key]:
            del running[key]
        disconnected.cancel()
        task.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    await request_state(request).abandoned()


def _running_key(request: Request) -> tuple[str, str]:
    """Return the client and the id under which `AppState.running` has this request."""
    state = request_state(request)
    return state.client or "", state.id
