"""Bounds on bodies and answers of all requests together, called as an ASGI server calls them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import create_app
from server.api.body_limit import TEXT_BODY_BYTES, BodyBudget, BodyLimit
from server.api.errors import ApiError, ClientStalledError
from server.api.send_timeout import PIECE_BYTES, TRANSPORT, SendTimeout
from server.settings import Settings
from tests import fake_worker
from tests.virtual_time import START, settle, virtual_time

CHUNK = TEXT_BODY_BYTES
SCOPE: Scope = {"type": "http", "headers": []}


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────


class Upload:
    """A body that an app reads as the test sends it. `answer` lets the app begin its answer."""

    def __init__(self, limit: BodyLimit) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self.answer = asyncio.Event()
        self.task = asyncio.create_task(limit(SCOPE | {"upload": self}, self._messages.get, _drop))

    async def send(self, *chunks: bytes, more: bool = True) -> None:
        for chunk in chunks:
            self._messages.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        await settle()

    def code(self) -> str | None:
        """The code of the error that the app got, None if it got none so far."""
        if not self.task.done():
            return None
        error = self.task.exception()
        return error.code if isinstance(error, ApiError) else None


async def _drop(_: Message) -> None:
    pass


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive())["more_body"]:
        pass
    await scope["upload"].answer.wait()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.Event().wait()


def uploads(budget: int, total_s: float = 600.0) -> Callable[[], Upload]:
    """Return a function that begins an upload; all of them share the budget."""
    limit = BodyLimit(reading, 100 * CHUNK, 60.0, total_s, BodyBudget(budget))
    return lambda: Upload(limit)


@virtual_time
async def test_beyond_the_budget_the_slowest_unfinished_body_is_rejected() -> None:
    begin = uploads(6 * CHUNK)
    stalled = begin()
    await stalled.send(*[b"a" * CHUNK] * 4)
    await asyncio.sleep(10)
    quick = begin()
    await quick.send(*[b"a" * CHUNK] * 2)
    assert (stalled.code(), quick.code()) == (None, None), "they are no more than the budget"
    await quick.send(b"a")
    assert (stalled.code(), quick.code()) == ("body_budget_exceeded", None)
    await quick.send(*[b"a" * CHUNK] * 3)
    assert quick.code() is None, "the rejected body no longer counts"


@virtual_time
async def test_a_complete_body_counts_until_its_answer_begins_and_is_not_rejected() -> None:
    begin = uploads(3 * CHUNK)
    first, second = begin(), begin()
    await first.send(b"a" * 2 * CHUNK, more=False)
    await second.send(b"a" * 2 * CHUNK, more=False)
    assert (first.code(), second.code()) == (None, "body_budget_exceeded")
    first.answer.set()
    await settle()
    third = begin()
    await third.send(b"a" * 3 * CHUNK, more=False)
    assert third.code() is None


@virtual_time
async def test_clients_beyond_the_budget_are_told_different_times_to_retry() -> None:
    begin = uploads(2 * CHUNK)
    held = begin()
    await held.send(b"a" * 2 * CHUNK, more=False)
    rejected = [begin() for _ in range(3)]
    for upload in rejected:
        await upload.send(b"a" * 2 * CHUNK, more=False)
    errors = [upload.task.exception() for upload in rejected]
    waits = [error.headers["retry-after-ms"] for error in errors if isinstance(error, ApiError)]
    assert waits == ["1000", "1250", "1500"]
    assert held.code() is None


@virtual_time
async def test_bodies_of_text_pass_whatever_the_budget() -> None:
    begin = uploads(CHUNK)
    bodies = [begin() for _ in range(10)]
    for body in bodies:
        await body.send(b"a" * CHUNK, more=False)
    assert [body.code() for body in bodies] == [None] * 10


def test_an_app_reads_a_body_within_its_bound_even_if_the_budget_is_smaller(
    fake_settings: Callable[..., Settings],
) -> None:
    settings = fake_settings(max_body_bytes=4 * CHUNK, body_budget_bytes=1)
    client = TestClient(create_app(settings, worker=fake_worker.main))
    assert client.post("/generate", json={"prompt": "a" * 3 * CHUNK}).status_code == 422
    assert client.post("/edit", files={"image": bytes(3 * CHUNK)}).status_code == 422
    assert client.post("/edit", files={"image": bytes(5 * CHUNK)}).status_code == 413


@virtual_time
async def test_a_whole_body_has_a_timeout_however_often_a_byte_of_it_arrives() -> None:
    body = uploads(CHUNK, total_s=100.0)()
    while time.monotonic() - START < 99:
        await body.send(b"a")
        await asyncio.sleep(20)
    assert (body.code(), time.monotonic() - START) == ("body_too_slow", 100)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


class Transport:
    aborted = False

    def abort(self) -> None:
        self.aborted = True


class Client:
    """Reads pieces at the given pace, then no more. `leaves_after`: pieces."""

    def __init__(self, pause_s: float, leaves_after: int = 10**9) -> None:
        self.pause_s, self.leaves_after = pause_s, leaves_after
        self.pieces: list[bytes] = []
        self.complete = False
        self.transport = Transport()

    @property
    def scope(self) -> Scope:
        return SCOPE | {TRANSPORT: self.transport}

    async def read(self, message: Message) -> None:
        await asyncio.sleep(self.pause_s if len(self.pieces) < self.leaves_after else 3600)
        if message["type"] == "http.response.body":
            self.pieces.append(message["body"])
            self.complete = not message["more_body"]


def answering(content: bytes) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    return app


@virtual_time
async def test_every_piece_of_an_answer_has_the_send_timeout() -> None:
    content = bytes(range(256)) * PIECE_BYTES
    client = Client(pause_s=29)
    app = SendTimeout(answering(content), 30, len(content))
    await app(client.scope, _never, client.read)
    assert (b"".join(client.pieces), client.complete) == (content, True)
    assert max(map(len, client.pieces)) == PIECE_BYTES
    assert not client.transport.aborted


@virtual_time
async def test_the_connection_of_a_client_that_reads_nothing_is_aborted() -> None:
    client = Client(pause_s=1, leaves_after=2)
    app = SendTimeout(answering(b"a" * 10 * PIECE_BYTES), 30, 100 * PIECE_BYTES)
    with pytest.raises(ClientStalledError):
        await app(client.scope, _never, client.read)
    assert (client.transport.aborted, client.complete) == (True, False)
    assert time.monotonic() - START == 33


@virtual_time
async def test_beyond_the_budget_the_answer_that_waits_longest_is_aborted() -> None:
    app = SendTimeout(answering(b"a" * 10 * PIECE_BYTES), 1000, 15 * PIECE_BYTES)
    stalled, slow, latest = Client(1, leaves_after=1), Client(10), Client(1)
    tasks = []
    for client in (stalled, slow, latest):
        tasks.append(asyncio.create_task(app(client.scope, _never, client.read)))
        await asyncio.sleep(60)
    assert (stalled.transport.aborted, slow.transport.aborted) == (True, False)
    assert latest.complete
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert slow.complete


@virtual_time
async def test_the_connection_of_an_answer_that_breaks_off_is_aborted() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    client = Client(0)
    with pytest.raises(RuntimeError):
        await SendTimeout(broken, 30, PIECE_BYTES)(client.scope, _never, client.read)
    assert client.transport.aborted


@virtual_time
async def test_an_app_aborts_the_connection_of_a_client_that_reads_nothing(
    fake_settings: Callable[..., Settings],
) -> None:
    app = create_app(fake_settings(send_timeout_s=5), worker=fake_worker.main)
    client = Client(pause_s=1, leaves_after=0)
    request = {"method": "GET", "path": "/healthz", "query_string": b""}
    scope = {**client.scope, **request, "headers": [(b"host", b"localhost")]}
    await app(scope, _never, client.read)
    assert client.transport.aborted
    assert time.monotonic() - START == 5


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError
