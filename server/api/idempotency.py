"""`Idempotency-Key`: a repeated request gets the first answer, or waits for it while it is made.

A handler calls `RequestState.earlier_answer` once it has the request's fields. The middleware
`Idempotency` keeps the answer to a first request. Per process: docs/scale.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST, ApiError, ClientStalledError
from server.api.state import owner_of, request_state, unless_cancelled
from server.fair_cache import FairCache
from server.metrics import Metrics

HEADER = "Idempotency-Key"
# Header of an answer that was given before.
REPLAYED = "Idempotent-Replayed"
VALID_KEY = re.compile(r"[ -~]{1,255}")
# Seconds for which an answer is kept, and for which work goes on after its last client has left.
LIFETIME_S = 600.0
GRACE_S = 5.0
# Memory of an entry beside the answer's body.
OVERHEAD_BYTES = 4096
# Answers of these statuses depend on the moment.
NOT_KEPT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, CLIENT_CLOSED_REQUEST)
# Codes of errors that concern only the client that met them.
OWN_ERRORS = frozenset({"client_closed", "cancelled"})
EVENT_STREAM = "text/event-stream"
# The events of a stream that are its results: no previews, nothing about the queue.
RESULT_EVENT = re.compile(rb"event: (image|error|\S*completed)\n")

# Owner and sent value.
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was sent.

    Attributes:
        status: HTTP status.
        headers: as ASGI has them.
        chunks: of the body, or a stream's events.
        error_code: of an error answer.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    chunks: tuple[bytes, ...]
    error_code: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.chunks))

    @property
    def is_success(self) -> bool:
        """Return whether it is no error."""
        return self.status < HTTPStatus.BAD_REQUEST


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer, and the digest of the request's fields."""

    digest: bytes
    answer: Answer


@dataclass(eq=False, slots=True)
class Attempt:
    """A first request under a key, until it is answered.

    Attributes:
        digest: of its fields.
        answer: for the repeats that wait; None if it has none for them.
    """

    digest: bytes
    answer: Answer | None = None
    _waiting: int = 0
    _joined: asyncio.Event = field(default_factory=asyncio.Event)
    _left: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def join(self) -> Answer | None:
        """Wait for the answer; None: there is none, and the repeat must start anew."""
        self._waiting += 1
        self._joined.set()
        try:
            await self._ended.wait()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._joined.clear()
                self._left.set()
        return self.answer

    async def abandoned(self) -> None:
        """Return when no repeat has waited for `GRACE_S`, although the first client has left."""
        while True:
            self._left.clear()
            try:
                async with asyncio.timeout(GRACE_S):
                    await self._joined.wait()
            except TimeoutError:
                return
            await self._left.wait()

    def end(self, answer: Answer | None) -> None:
        """Let the repeats go."""
        self.answer = answer
        self._ended.set()


class IdempotencyTable:
    """Requests with a key that are being answered, and the answers that are kept.

    Attributes:
        answers: those kept; they make room for those being made.
        running: by owner and sent value.
        repeats: counts repeats by outcome.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        """Create an empty table. limit: bytes."""
        self.answers = FairCache[Name, KeptAnswer](limit, LIFETIME_S)
        self.running: dict[Name, Attempt] = {}
        self.repeats = metrics.idempotent_repeats
        metrics.idempotency_bytes.set_function(lambda: self.answers.bytes)


class Idempotency:
    """ASGI middleware that keeps the answers of first requests with an `Idempotency-Key`.

    Requests without this header do not pass it (`middleware.WithHeader`).
    """

    def __init__(self, app: ASGIApp, table: IdempotencyTable) -> None:
        self._app, self._table = app, table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one HTTP request on. Raises ClientStalledError, once the answer is made."""
        recorder = Recorder(self._table, scope, send)
        request_state(scope).earlier_answer = recorder.earlier_answer
        try:
            await self._app(scope, receive, recorder.send)
        finally:
            recorder.end()
        if recorder.stalled is not None:
            raise recorder.stalled


class Recorder:
    """One request's answer on its way to the client; kept if the request is the first of its key.

    Attributes:
        table: of all requests.
        stalled: the error of a client that did not take its answer, which is then made without it.
    """

    def __init__(self, table: IdempotencyTable, scope: Scope, send: Send) -> None:
        self.table = table
        self.stalled: ClientStalledError | None = None
        self._scope, self._send = scope, send
        self._name: Name = ("", "")
        self._attempt: Attempt | None = None
        self._start: Message = {}
        self._is_stream = False
        # None: too large.
        self._chunks: list[bytes] | None = []
        self._reserved = 0

    async def earlier_answer(self, request: Request, fields: BaseModel) -> Response | None:
        """Return the answer to an earlier request of the same owner with this `Idempotency-Key`.

        Waits for an answer that is being made. None: this is the first request with the key, and
        the handler's answer is kept.

        Args:
            request: the request.
            fields: its fields, which repeats must have too.

        Raises:
            ApiError: 400 invalid key, 422 (400 under /v1) another request under the same key, 499.
        """
        name, table = (owner_of(request), _sent_key(request)), self.table
        digest = await asyncio.to_thread(digest_of, request.scope["path"], fields)
        while True:
            kept = table.answers.get(name)
            # An error gave the client nothing: the corrected request may have the same key.
            if kept is not None and (kept[0].digest == digest or kept[0].answer.is_success):
                _check_same(request, table, digest, kept[0].digest)
                return _repeat(request, table, kept[0].answer, "answered")
            if (attempt := table.running.get(name)) is None:
                request_state(request).abandoned = self.begin(name, digest).abandoned
                return None
            _check_same(request, table, digest, attempt.digest)
            if (answer := await unless_cancelled(request, attempt.join())) is not None:
                return _repeat(request, table, answer, "joined")

    def begin(self, name: Name, digest: bytes) -> Attempt:
        """Keep the answer from now on, for repeats under this name."""
        self._name = name
        self._attempt = self.table.running[name] = Attempt(digest)
        return self._attempt

    async def send(self, message: Message) -> None:
        """Note a part of the answer, then send it. Raises ClientStalledError."""
        # Before it is sent: the answer is then kept although the client dies.
        if self._attempt is not None:
            self._note(message)
        if self.stalled is not None:
            return
        try:
            await self._send(message)
        except ClientStalledError as error:
            if self._attempt is None:
                raise
            self.stalled = error

    def end(self) -> None:
        """End the attempt, if it still runs, without an answer."""
        self._finish(None)

    def _note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            media_type = Headers(raw=message["headers"]).get("content-type", "")
            self._is_stream = media_type.startswith(EVENT_STREAM)
            return
        chunk = message.get("body", b"")
        if chunk and (not self._is_stream or RESULT_EVENT.match(chunk)):
            self._keep(chunk)
        if not message.get("more_body", False):
            self._finish(self._answer())

    def _keep(self, chunk: bytes) -> None:
        if self._chunks is None:
            return
        if self.table.answers.reserve(self._name[0], len(chunk)):
            self._reserved += len(chunk)
            self._chunks.append(chunk)
        elif self._is_stream:
            self._chunks = None
        else:
            # The repeats that wait may have it; it is in memory anyway.
            self._chunks.append(chunk)

    def _answer(self) -> Answer | None:
        """Return the complete answer; None if it is of no use to a repeat."""
        code = request_state(self._scope).error_code
        if self._chunks is None or code in OWN_ERRORS:
            return None
        headers = tuple((bytes(name), bytes(value)) for name, value in self._start["headers"])
        return Answer(self._start["status"], headers, tuple(self._chunks), code)

    def _finish(self, answer: Answer | None) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        self.table.answers.release(self._reserved)
        if answer is not None and self._is_final(answer):
            kept = KeptAnswer(attempt.digest, answer), answer.size + OVERHEAD_BYTES
            self.table.answers.add(self._name[0], {self._name: kept})
        del self.table.running[self._name]
        attempt.end(answer)

    def _is_final(self, answer: Answer) -> bool:
        """Return whether a later attempt would end alike."""
        if self._is_stream:
            return answer.error_code is None
        status = answer.status
        return status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in NOT_KEPT


class RepeatedAnswer(Response):
    """An answer that was given before."""

    def __init__(self, answer: Answer) -> None:
        # Response's own __init__ would join the chunks.
        self.status_code, self.background = answer.status, None
        self.raw_headers = [*answer.headers, (REPLAYED.lower().encode(), b"true")]
        self._chunks = answer.chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        *chunks, last = self._chunks or (b"",)
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _repeat(request: Request, table: IdempotencyTable, answer: Answer, outcome: str) -> Response:
    table.repeats.labels(outcome).inc()
    request_state(request).error_code = answer.error_code
    return RepeatedAnswer(answer)


def _sent_key(request: Request) -> str:
    sent = request.headers.getlist(HEADER)
    if len(sent) != 1 or not VALID_KEY.fullmatch(sent[0]):
        shown = ", ".join(sent)[:80]
        message = f"{HEADER}: one value of 1 to 255 printable ASCII characters (sent: {shown!r})"
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_idempotency_key", message, HEADER)
    return sent[0]


def _check_same(request: Request, table: IdempotencyTable, sent: bytes, first: bytes) -> None:
    """Raise ApiError if a request differs from the first one under its key."""
    if sent == first:
        return
    table.repeats.labels("mismatch").inc()
    message = f"{HEADER}: another request was sent with this key; send a new key with new fields"
    is_openai = request.scope["path"].startswith("/v1/")
    status = HTTPStatus.BAD_REQUEST if is_openai else HTTPStatus.UNPROCESSABLE_ENTITY
    raise ApiError(status, "idempotency_mismatch", message, HEADER)


def digest_of(path: str, fields: BaseModel) -> bytes:
    """Return a digest of a request: of its fields' values and of the files' contents."""
    text = json.dumps([path, _plain(fields)], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).digest()


def _plain(value: Any) -> Any:
    match value:
        case bytes():
            return {"sha256": hashlib.sha256(value).hexdigest()}
        case BaseModel():
            return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case dict():
            return {str(name): _plain(inner) for name, inner in value.items()}
    return value
