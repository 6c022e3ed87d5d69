"""Bounds on bodies, request ids, the access log and the health port, called as an ASGI server
calls them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body_limit import BodyLimit
from server.api.compression import Compression
from server.api.error_handlers import error_response
from server.api.errors import ApiError, ClientStalledError
from server.api.middleware import (
    CanonicalPath,
    HeadAsGet,
    HealthPort,
    InternalErrors,
    Observation,
    SecurityHeaders,
    WithHeader,
)
from server.api.origin_guard import CrossOrigin
from server.api.send_timeout import SendTimeout
from server.api.state import RequestState, add_request_state, request_state
from server.metrics import Metrics
from tests.virtual_time import START, virtual_time

LIMIT, TIMEOUT_S = 100, 5.0


def http_scope(
    path: str = "/generate", headers: Sequence[tuple[bytes, bytes]] = (), **more: Any
) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": list(headers),
        "client": ("10.0.0.1", 5),
        **more,
    }


class Body:
    """A request's body as a server hands it on, with a pause before each chunk; then the
    client's disconnect, an hour later.
    """

    def __init__(self, *chunks: bytes, pause_s: float = 0.0) -> None:
        self._left, self._pause_s = list(chunks), pause_s

    async def __call__(self) -> Message:
        if not self._left:
            await asyncio.sleep(3600)
            return {"type": "http.disconnect"}
        await asyncio.sleep(self._pause_s)
        chunk = self._left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(self._left)}


async def sent_by(app: ASGIApp, scope: Scope, receive: Receive = Body(b"")) -> list[Message]:  # noqa: B008
    messages: list[Message] = []

    async def keep(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, keep)
    return messages


def answering(*headers: tuple[bytes, bytes], status: int = 200) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": b"x"})

    return app


def app_with(metrics: Metrics) -> SimpleNamespace:
    """Return as much of an app as an error answer needs."""
    return SimpleNamespace(state=SimpleNamespace(paellera=SimpleNamespace(metrics=metrics)))


def headers_of(message: Message) -> dict[str, str]:
    return {name.decode().lower(): value.decode() for name, value in message["headers"]}


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────


async def read(body: Body, *headers: tuple[bytes, bytes]) -> list[Message]:
    """Let an app read a bounded body and then wait for the disconnect; return what it received."""
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while not received or received[-1]["type"] == "http.request":
            received.append(await receive())

    await BodyLimit(app, LIMIT, TIMEOUT_S)(http_scope(headers=headers), body, Send)  # type: ignore[arg-type]
    return received


@virtual_time
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_may_have_as_many_bytes_as_the_limit_and_no_more(announced: bool) -> None:
    def length(n: int) -> tuple[tuple[bytes, bytes], ...]:
        return ((b"content-length", b"%d" % n),) if announced else ()

    received = await read(Body(b"a" * 60, b"b" * 40), *length(100))
    assert b"".join(message.get("body", b"") for message in received) == b"a" * 60 + b"b" * 40
    with pytest.raises(ApiError) as error:
        await read(Body(b"a" * 60, b"b" * 41), *length(101))
    assert (error.value.status, error.value.code) == (413, "body_too_large")


@virtual_time
async def test_a_body_that_is_longer_than_announced_is_bounded_all_the_same() -> None:
    with pytest.raises(ApiError):
        await read(Body(*[b"a" * 10] * 11), (b"content-length", b"10"))


@virtual_time
async def test_an_announced_body_is_rejected_before_it_is_read() -> None:
    with pytest.raises(ApiError):
        await read(Body(b"", pause_s=TIMEOUT_S - 1), (b"content-length", b"101"))
    assert time.monotonic() == START


@virtual_time
async def test_the_timeout_counts_from_chunk_to_chunk() -> None:
    await read(Body(*[b"a"] * 50, pause_s=TIMEOUT_S - 0.1))
    with pytest.raises(ApiError) as error:
        await read(Body(b"a", pause_s=TIMEOUT_S + 0.1))
    assert (error.value.status, error.value.code) == (408, "body_too_slow")


@virtual_time
async def test_the_wait_for_the_client_s_disconnect_has_no_timeout() -> None:
    received = await read(Body(b"a"))
    assert [message["type"] for message in received] == ["http.request", "http.disconnect"]
    assert time.monotonic() - START >= 3600


# ── observation ───────────────────────────────────────────────────────────────────────────────────


async def observed(
    app: ASGIApp, caplog: pytest.LogCaptureFixture, scope: Scope
) -> tuple[list[Message], dict[str, Any], Metrics]:
    """Return the answer, the access log's fields and the metrics."""
    metrics = Metrics()
    metrics.expect(["/generate"])
    with caplog.at_level(logging.INFO, logger="server"):
        messages = await sent_by(Observation(app, metrics), scope)
    (fields,) = [
        record.fields
        for record in caplog.records
        if record.name == "server.access" and record.msg == "request"
    ]
    return messages, fields, metrics


async def test_the_client_s_request_id_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    scope = http_scope(headers=[(b"x-request-id", b"mine")])
    (start, _), fields, metrics = await observed(
        answering((b"server-timing", b"queue;dur=1")), caplog, scope
    )
    assert (
        headers_of(start)["x-request-id"]
        == fields["request_id"]
        == request_state(scope).id
        == "mine"
    )
    assert {
        name: fields[name] for name in ("method", "path", "status", "server_timing", "client")
    } == {
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "server_timing": "queue;dur=1",
        "client": "10.0.0.1",
    }
    assert not {"code", "key"} & set(fields), "what there is not is not logged"
    assert fields["duration_ms"] >= 0
    labels = {"endpoint": "/generate", "status": "200"}
    assert metrics.registry.get_sample_value("paella_request_duration_seconds_count", labels) == 1


@pytest.mark.parametrize("id", [b"", b"x" * 129, b"a\tb", "é".encode("latin-1")])
async def test_an_invalid_request_id_is_replaced(
    caplog: pytest.LogCaptureFixture, id: bytes
) -> None:
    (start, _), fields, _ = await observed(
        answering(), caplog, http_scope(headers=[(b"x-request-id", id)])
    )
    assert headers_of(start)["x-request-id"] == fields["request_id"]
    assert len(fields["request_id"]) == 32


async def test_an_exception_is_logged_and_answered_with_500_unless_the_answer_has_begun(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("/secret")

    async def breaking_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("/secret")

    messages, fields, _ = await observed(InternalErrors(broken), caplog, http_scope())
    assert (messages[0]["status"], fields["status"]) == (500, 500)
    assert b"secret" not in messages[1]["body"]
    assert "x-request-id" in headers_of(messages[0])
    assert [
        record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR
    ] == [True]
    caplog.clear()
    messages, fields, _ = await observed(InternalErrors(breaking_off), caplog, http_scope())
    assert [message["type"] for message in messages] == ["http.response.start"]
    assert fields["status"] == 200


async def test_a_client_that_stalled_is_logged_and_gets_no_second_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def stalled(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientStalledError

    messages, fields, _ = await observed(InternalErrors(stalled), caplog, http_scope())
    assert (messages, fields["code"], fields["status"]) == ([], "client_stalled", 0)


async def test_a_duration_is_logged_in_milliseconds_and_measured_in_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(perf_counter=iter([10.0, 10.25]).__next__)
    monkeypatch.setattr("server.api.middleware.time", clock)
    _, fields, metrics = await observed(answering(), caplog, http_scope())
    assert fields["duration_ms"] == 250
    labels = {"endpoint": "/generate", "status": "200"}
    assert metrics.registry.get_sample_value("paella_request_duration_seconds_sum", labels) == 0.25


@pytest.mark.parametrize(
    ("status", "code", "counted"),
    [
        (422, "invalid_value", 1),
        (429, "queue_full", 1),
        (503, "draining", 1),
        (503, "not_ready", 0),
        (499, "client_closed", 0),
        (500, "internal", 0),
        (504, "deadline_exceeded", 0),
    ],
)
def test_refusals_are_counted_and_failures_are_not(status: int, code: str, counted: int) -> None:
    metrics = Metrics()
    scope = http_scope(app=app_with(metrics))
    add_request_state(scope, RequestState("id"))
    assert error_response(ApiError(status, code, "why"), Request(scope)).status_code == status
    assert request_state(scope).error_code == code
    value = metrics.registry.get_sample_value("paella_rejected_total", {"reason": code})
    assert (value or 0) == counted


async def test_an_unknown_path_is_cut_in_the_log_and_becomes_no_label(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, fields, metrics = await observed(answering(status=404), caplog, http_scope("/" + "x" * 500))
    assert fields["path"] == "/" + "x" * 199
    labels = {"endpoint": "unmatched", "status": "404"}
    assert metrics.registry.get_sample_value("paella_request_duration_seconds_count", labels) == 1


# ── headers and ports ─────────────────────────────────────────────────────────────────────────────


async def test_security_headers_are_added_and_an_answer_s_own_are_kept() -> None:
    start, _ = await sent_by(
        SecurityHeaders(answering((b"x-frame-options", b"SAMEORIGIN"))), http_scope()
    )
    assert headers_of(start) == {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "SAMEORIGIN",
        "content-security-policy": "frame-ancestors 'none'",
    }


@pytest.mark.parametrize(
    ("path", "port", "status"),
    [
        ("/healthz", 9, 200),
        ("/metrics", 9, 200),
        ("/generate", 8, 200),
        ("/readyz", 8, 404),
        ("/generate", 9, 404),
    ],
)
async def test_health_has_a_port_of_its_own(path: str, port: int, status: int) -> None:
    app = Observation(HealthPort(answering(), port=9), Metrics())
    scope = http_scope(path, server=("0.0.0.0", port), app=app_with(Metrics()))
    start, _ = await sent_by(app, scope)
    assert start["status"] == status


@pytest.mark.parametrize(
    "wrap",
    [
        lambda app: BodyLimit(app, 0, 0.0),
        lambda app: SendTimeout(app, 0.0, 0),
        lambda app: HealthPort(app, 9),
        lambda app: SecurityHeaders(app),
        lambda app: Observation(app, Metrics()),
        lambda app: InternalErrors(app),
        lambda app: CrossOrigin(app, ["*"], []),
        lambda app: CanonicalPath(app),
        lambda app: HeadAsGet(app),
        lambda app: Compression(app),
        lambda app: WithHeader(app, "origin", SecurityHeaders),
    ],
)
async def test_events_of_the_server_s_life_pass_unchanged(
    wrap: Callable[[ASGIApp], ASGIApp],
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(await receive())

    async def startup() -> Message:
        return {"type": "lifespan.startup"}

    assert await sent_by(wrap(app), {"type": "lifespan"}, startup) == [{"type": "lifespan.startup"}]
