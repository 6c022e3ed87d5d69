"""Compression of JSON answers: for whom, of what, and what it holds in memory."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.compression import Compression, accepts_gzip
from server.api.errors import ClientStalledError
from server.api.send_timeout import HELD_BYTES, SendTimeout

TEXT = json.dumps({"names": ["paella"] * 1000}).encode()
RANDOM = json.dumps({"b64_json": random.Random(0).randbytes(100_000).hex()}).encode()


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("gzip, deflate, br, zstd", True),
        ("*", True),
        ("x-gzip", True),
        ("gzip;q=1", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0, *", False),
        ("gzip;q=much", False),
        ("gzip;q=inf", False),
        ("*;q=0", False),
    ],
)
def test_gzip_is_used_where_it_is_accepted(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


async def answered_in_pieces(
    pieces: Sequence[bytes],
    media_type: str = "application/json",
    accept: str = "gzip",
    **extra: str,
) -> tuple[dict[str, str], list[Message]]:
    """Return headers and body messages of an answer through the middleware."""
    headers = {"content-type": media_type, "content-length": str(sum(map(len, pieces))), **extra}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        for piece in pieces[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": pieces[-1]})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Any = {"type": "http", "headers": [(b"accept-encoding", accept.encode())]}
    await Compression(app)(scope, None, send)  # type: ignore[arg-type]
    start, *contents = sent
    return {name.decode(): value.decode() for name, value in start["headers"]}, contents


async def answered(body: bytes, *kind: str, **extra: str) -> tuple[dict[str, str], Message]:
    """Return headers and the only body message, as `answered_in_pieces`."""
    headers, (content,) = await answered_in_pieces([body], *kind, **extra)
    return headers, content


# What is repeated, and what code lengths alone make shorter.
@pytest.mark.parametrize(("body", "share"), [(TEXT, 0.05), (RANDOM, 0.8)])
async def test_json_is_compressed(body: bytes, share: float) -> None:
    headers, message = await answered(body)
    assert gzip.decompress(message["body"]) == body
    assert len(message["body"]) < share * len(body)
    assert headers["content-encoding"] == "gzip"
    assert headers["content-length"] == str(len(message["body"]))
    assert headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize(
    ("body", "media_type", "accept", "varies"),
    [
        (TEXT, "application/json", "br", True),
        (b"{}", "application/json", "gzip", True),
        (TEXT, "image/png", "gzip", False),
        (TEXT, "text/event-stream", "gzip", False),
    ],
)
async def test_other_answers_stay_as_they_are(
    body: bytes, media_type: str, accept: str, varies: bool
) -> None:
    headers, message = await answered(body, media_type, accept)
    assert message["body"] == body
    assert "content-encoding" not in headers
    assert ("vary" in headers) is varies


@pytest.mark.parametrize(("length", "compressed"), [(499, False), (500, True)])
async def test_json_is_compressed_from_500_bytes_on(length: int, compressed: bool) -> None:
    headers, _ = await answered(b"[" + b" " * (length - 2) + b"]")
    assert ("content-encoding" in headers) is compressed


async def test_json_that_comes_in_pieces_stays_as_it_is() -> None:
    pieces = [TEXT[:1000], TEXT[1000:]]
    headers, messages = await answered_in_pieces(pieces)
    assert [message["body"] for message in messages] == pieces
    assert "content-encoding" not in headers


async def test_an_encoded_answer_is_not_encoded_again() -> None:
    headers, message = await answered(TEXT, **{"content-encoding": "br"})
    assert (message["body"], headers["content-encoding"]) == (TEXT, "br")


async def test_the_original_counts_as_an_unread_answer_too() -> None:
    """It stays in memory until the compressed answer is sent."""
    _, message = await answered(RANDOM)
    assert message[HELD_BYTES] == len(RANDOM)
    aborted: list[bool] = []

    class Transport:
        def abort(self) -> None:
            aborted.append(True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(message)

    async def send(_: Message) -> None:
        """Send to a client that takes everything."""

    scope: Any = {"type": "http", "paellera.transport": Transport()}
    budget = len(message["body"]) + len(RANDOM)
    await SendTimeout(app, 1, budget)(scope, None, send)  # type: ignore[arg-type]
    assert aborted == []
    with pytest.raises(ClientStalledError):
        await SendTimeout(app, 1, budget - 1)(scope, None, send)  # type: ignore[arg-type]
    assert aborted
