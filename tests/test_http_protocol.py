"""Connections of the command line's own server: trailers, upgrades, pipelines, how many there are,
how long each is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from load_tests.misbehaving import is_whole
from load_tests.processes import resident_mib
from load_tests.serving import free_port, wait_until_ready
from server.api.head_guard import MAX_URL_BYTES
from server.http_protocol import (
    CLOSE_TIMEOUT_S,
    LOGGED_EVERY_S,
    MAX_HEADERS,
    MAX_PIPELINED,
    MAX_TRAILER_BYTES,
    BoundedProtocol,
    Connections,
)
from server.settings import Settings
from tests.conftest import wait_until
from tests.support.access_log import said
from tests.support.api_keys import KEY
from tests.support.uvicorn_servers import all_answered, listening, served
from tests.support.virtual_time import START, virtual_time

Configure = Callable[..., Settings]
PATIENCE_S = 60
BODY = json.dumps({"prompt": "a ball"}).encode()
JSON_HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = (
    b"POST /generate HTTP/1.1\r\n"
    + JSON_HEAD
    + b"Transfer-Encoding: chunked\r\n%s\r\n%x\r\n%s\r\n0\r\n"
)
FAKE_SERVER = (sys.executable, "-m", "tests.fake_server")

pytestmark = pytest.mark.process


def chunked(headers: bytes = b"") -> bytes:
    """A chunked request without the end of its trailers."""
    return CHUNKED % (headers, len(BODY), BODY)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def one_answer(connection: socket.socket) -> bytes:
    """The next answer on a connection that stays open."""
    received = b""
    while not is_whole(received) and (piece := connection.recv(1000)):
        received += piece
    return received


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def error_of(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


@contextmanager
def process(
    bundle: Path,
    prepare: Callable[[], None] | None = None,
    output: IO[bytes] | int = subprocess.PIPE,
    **settings: str,
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server with a fake worker as a process, once it is ready, and its port.

    prepare: called in the process before the server. output: for its standard error.
    """
    port = free_port()
    environment = {**os.environ, "PAELLERA_WEIGHTS": str(bundle), **settings}
    server = subprocess.Popen(
        [*FAKE_SERVER, "--port", str(port)],
        env=environment,
        stderr=output,
        preexec_fn=prepare,
    )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/readyz")
        yield server, port
    finally:
        server.kill()
        server.wait()
        if server.stderr is not None:
            server.stderr.close()


def is_closed_after(connection: socket.socket, begun: bytes, endless: bytes) -> bool:
    """Return whether the server closes the connection before it has read many times the bound."""
    segment = endless * (2 * MAX_TRAILER_BYTES // len(endless))
    try:
        connection.sendall(begun)
        for _ in range(1000):
            connection.sendall(segment)
    except OSError:
        return True
    return False


# ── trailers ──────────────────────────────────────────────────────────────────────────────────────


def test_trailers_are_no_headers(
    fake_settings: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.access")
    with served(fake_settings(api_keys=KEY)) as client, connect(client.base_url.port or 0) as sent:
        trailers = b"X-Request-Id: trailer\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
        sent.sendall(chunked(b"X-Request-Id: head\r\nConnection: close\r\n") + trailers)
        answer = b"".join(iter(lambda: sent.recv(1000), b""))
    assert status_of(answer) == 401
    assert said(caplog, "head")["status"] == 401


def test_short_trailers_are_ignored(fake_settings: Configure) -> None:
    with served(fake_settings()) as client:
        request = chunked(b"Connection: close\r\n") + b"Digest: abc\r\n\r\n"
        assert status_of(all_answered(client.base_url.port or 0, request)) == 200


def test_names_and_values_of_trailers_are_bounded(fake_settings: Configure) -> None:
    with served(fake_settings()) as client:
        port = client.base_url.port or 0
        request = (
            chunked(b"Connection: close\r\n") + b"a: b\r\nc: " + b"d" * (MAX_TRAILER_BYTES - 3)
        )
        assert status_of(all_answered(port, request + b"\r\n\r\n")) == 200
        more = all_answered(port, request + b"d\r\n\r\n")
        assert (status_of(more), error_of(more)) == (400, "malformed_request")


@pytest.mark.parametrize(
    "endless", [b"a: b\r\n", b"a: " + b"b" * 1000, b"b"], ids=["many", "long", "name"]
)
def test_trailers_that_do_not_end_close_the_connection(
    fake_settings: Configure, endless: bytes
) -> None:
    with listening(fake_settings(api_keys=KEY)) as (port,), connect(port) as connection:
        assert is_closed_after(connection, chunked(), endless)


def test_the_extension_of_a_chunk_that_does_not_end_closes_the_connection(
    fake_settings: Configure,
) -> None:
    with listening(fake_settings()) as (port,), connect(port) as connection:
        assert is_closed_after(connection, chunked()[:-3] + b"1;", b"x")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_endless_trailers_take_no_memory_of_a_server_process(bundle: Path) -> None:
    with process(bundle) as (server, port):
        before = resident_mib(server.pid)
        for _ in range(5):
            with connect(port) as connection:
                connection.sendall(chunked())
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        connection.sendall(b"a: b\r\n" * 10_000)
        assert resident_mib(server.pid) - before < 30


# ── upgrades ──────────────────────────────────────────────────────────────────────────────────────

H2C = b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
WEBSOCKET = b"Connection: close, upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET])
@pytest.mark.parametrize("split", [0, 30, -5])
def test_a_request_that_would_like_another_protocol_is_answered_over_this_one(
    fake_settings: Configure, upgrade: bytes, split: int
) -> None:
    length = b"Content-Length: %d\r\n" % len(BODY)
    request = b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + upgrade + length + b"\r\n" + BODY
    with served(fake_settings()) as client, connect(client.base_url.port or 0) as connection:
        for part in (request[:split], request[split:]):
            connection.sendall(part)
            time.sleep(0.05)
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert status_of(answer) == 200
    assert b"image/png" in answer.partition(b"\r\n\r\n")[0]


def test_a_chunked_body_and_the_next_request_survive_an_upgrade(fake_settings: Configure) -> None:
    with served(fake_settings()) as client:
        upgrade = H2C.replace(b", close", b"")
        requests = (
            chunked(upgrade)
            + b"\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\n"
            + b"Upgrade: h2c\r\n\r\n"
        )
        answers = all_answered(client.base_url.port or 0, requests)
    assert answers.count(b"HTTP/1.1 200 ") == 2


def test_an_upgrade_whose_body_does_not_come_is_answered_and_closed(
    fake_settings: Configure,
) -> None:
    request = (
        b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + WEBSOCKET + b"Content-Length: 100\r\n\r\n"
    )
    with listening(fake_settings(receive_timeout_s=0.2)) as (port,):
        assert status_of(all_answered(port, request)) == 408


def test_a_tunnel_is_refused(fake_settings: Configure) -> None:
    with listening(fake_settings()) as (port,):
        answer = all_answered(port, b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
    assert (status_of(answer), error_of(answer)) == (400, "malformed_request")


# ── heads ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"GET /healthz HTTP/1.1\r\n", "invalid_host"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", "invalid_host"),
        (b"GET /healthz HTTP/1.0\r\nHost: localhost\r\nHost: b\r\n", "invalid_host"),
        (b"GET /v1/models HTTP/1.1\r\n", "invalid_host"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", "invalid_host"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", "invalid_host"),
        (
            b"POST /generate HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n",
            "invalid_transfer_encoding",
        ),
    ],
)
def test_a_head_that_proxies_may_read_otherwise_is_400_and_the_connection_closed(
    fake_settings: Configure, head: bytes, code: str
) -> None:
    with listening(fake_settings()) as (port,):
        answer = all_answered(port, head + b"\r\n")
    assert (status_of(answer), error_of(answer)) == (400, code)


@pytest.mark.parametrize(
    ("coding", "status"),
    [
        (b"gzip, chunked", 400),
        (b"GZIP\r\nTransfer-Encoding: Chunked", 400),
        (b"identity, chunked", 200),
        (b"Chunked", 200),
    ],
)
def test_an_encoded_body_in_chunks_is_400_that_names_the_encoding(
    fake_settings: Configure, coding: bytes, status: int
) -> None:
    request = CHUNKED.replace(b"chunked", coding) % (b"Connection: close\r\n", len(BODY), BODY)
    with listening(fake_settings()) as (port,):
        answer = all_answered(port, request + b"\r\n")
    assert status_of(answer) == status
    if status == 400:
        assert error_of(answer) == "invalid_transfer_encoding"
        assert b"gzip, chunked" in answer.lower()


def test_headers_are_bounded_in_number_as_each_takes_memory(fake_settings: Configure) -> None:
    with listening(fake_settings()) as (port,):
        head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        most = all_answered(port, head + b"a: b\r\n" * (MAX_HEADERS - 2) + b"\r\n")
        more = all_answered(port, head + b"a: b\r\n" * (MAX_HEADERS - 1) + b"\r\n")
    assert status_of(most) == 200
    assert (status_of(more), error_of(more)) == (431, "headers_too_large")


def test_a_url_is_bounded_in_bytes_with_its_query(fake_settings: Configure) -> None:
    head = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    url = b"/healthz?" + b"a" * (MAX_URL_BYTES - 9)
    with listening(fake_settings()) as (port,):
        assert status_of(all_answered(port, head % url)) == 200
        longer = all_answered(port, head % (url + b"a"))
    assert (status_of(longer), error_of(longer)) == (414, "url_too_long")


def test_http_1_0_gets_a_stream_as_it_is_until_the_connection_ends(
    fake_settings: Configure,
) -> None:
    body = b'{"prompt": "a ball", "stream": true}'
    head = (
        b"POST /generate HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with listening(fake_settings()) as (port,):
        answer = all_answered(port, head % len(body) + body)
    headers, _, events = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 200
    assert b"transfer-encoding" not in headers.lower()
    assert b"connection: close" in headers.lower()
    assert events.startswith((b"event:", b"data:", b":"))
    assert events.endswith(b"\n\n")


def test_http_1_0_needs_no_host(fake_settings: Configure) -> None:
    with listening(fake_settings()) as (port,):
        assert status_of(all_answered(port, b"GET /healthz HTTP/1.0\r\n\r\n")) == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
def test_an_encoded_body_is_415_and_the_header_named(client: httpx.Client, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    answer = client.post("/generate", content=b"\x1f\x8b", headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "unsupported_content_encoding")
    assert "Content-Encoding" in error["message"]
    assert answer.headers["accept-encoding"] == "identity"
    identity = headers | {"Content-Encoding": "identity"}
    assert client.post("/generate", content=BODY, headers=identity).status_code == 200


def test_requests_before_the_first_answer_are_bounded(fake_settings: Configure) -> None:
    request = b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + b"Content-Length: %d\r\n\r\n%s"
    hold = request % (18, b'{"prompt": "hold"}')
    with served(fake_settings()) as client, connect(client.base_url.port or 0) as connection:
        connection.sendall(
            hold + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * MAX_PIPELINED
        )
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(20)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1) == b""


def test_a_malformed_body_is_answered_if_nobody_can_take_that_for_an_earlier_answer(
    fake_settings: Configure,
) -> None:
    malformed = chunked()[:-3] + b"no size\r\n\r\n"
    held = b'{"prompt": "hold"}'
    earlier = b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + b"Content-Length: 18\r\n\r\n" + held
    with served(fake_settings()) as client:
        port = client.base_url.port or 0
        answer = all_answered(port, malformed)
        assert (status_of(answer), error_of(answer)) == (400, "malformed_request")
        assert all_answered(port, earlier + malformed) == b""


# ── idle connections ──────────────────────────────────────────────────────────────────────────────


def test_an_idle_connection_is_kept_for_its_own_timeout(fake_settings: Configure) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        listening(fake_settings(receive_timeout_s=0.2, keep_alive_s=1)) as (port,),
        connect(port) as connection,
    ):
        connection.sendall(request)
        assert status_of(one_answer(connection)) == 200
        time.sleep(0.5)
        connection.sendall(request)
        assert status_of(one_answer(connection)) == 200
        began = time.monotonic()
        assert connection.recv(1000) == b""
        assert 0.5 < time.monotonic() - began < 10


def test_a_head_after_an_answer_has_the_timeout_of_heads(fake_settings: Configure) -> None:
    with (
        listening(fake_settings(receive_timeout_s=0.2, keep_alive_s=600)) as (port,),
        connect(port) as connection,
    ):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of(one_answer(connection)) == 200
        connection.sendall(b"\r\n")
        assert connection.recv(1000) == b""


# ── timers ────────────────────────────────────────────────────────────────────────────────────────

HEAD_S, IDLE_S, ANSWER_S = 30.0, 75.0, 10.0
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


class Transport:
    """Stand for a client that reads nothing more once its connection closes."""

    closed_at: float | None = None
    aborted_at: float | None = None

    def get_extra_info(self, name: str) -> None:
        """No socket, and no addresses."""

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed_at is not None

    def close(self) -> None:
        if self.closed_at is None:
            self.closed_at = time.monotonic() - START

    def abort(self) -> None:
        self.aborted_at = time.monotonic() - START

    def ended(self) -> tuple[float | None, float | None]:
        """Return when it was closed, and when aborted."""
        return self.closed_at, self.aborted_at


def connected(transport: Transport, answer_s: float = 0.0) -> BoundedProtocol:
    """Return a new connection, whose requests are answered after some seconds."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(answer_s)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    class Protocol(BoundedProtocol):
        all = Connections(10, exempt_port=None, on_refused=lambda: None)
        head_timeout_s = HEAD_S

    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        timeout_keep_alive=int(IDLE_S),
    )
    protocol = Protocol(config, ServerState(), {})
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return protocol


async def ends(sent: bytes, *, stopping: bool) -> tuple[float | None, float | None]:
    """Return when a connection that gets these bytes is closed and aborted; requests take 10 s."""
    transport = Transport()
    protocol = connected(transport, ANSWER_S)
    if sent:
        protocol.data_received(sent)
    if stopping:
        protocol.shutdown()
    await asyncio.sleep(1000)
    return transport.ended()


@virtual_time
@pytest.mark.parametrize(
    ("sent", "closed_at"),
    [
        (b"", HEAD_S),
        (GET, HEAD_S),
        (GET + b"\r\n", ANSWER_S + IDLE_S),
        (GET + b"Connection: close\r\n\r\n", ANSWER_S),
    ],
)
async def test_a_connection_is_closed_in_time_and_aborted_if_its_client_takes_nothing(
    sent: bytes, closed_at: float
) -> None:
    expected = (closed_at, closed_at + CLOSE_TIMEOUT_S)
    assert await ends(sent, stopping=False) == pytest.approx(expected)


@virtual_time
@pytest.mark.parametrize(("sent", "closed_at"), [(b"", 0.0), (GET + b"\r\n", ANSWER_S)])
async def test_a_stopping_server_closes_a_connection_at_once_or_after_its_answer(
    sent: bytes, closed_at: float
) -> None:
    expected = (closed_at, closed_at + CLOSE_TIMEOUT_S)
    assert await ends(sent, stopping=True) == pytest.approx(expected)


@virtual_time
async def test_a_long_head_that_comes_in_parts_is_not_taken_for_a_trailer() -> None:
    transport = Transport()
    protocol = connected(transport)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nA: "
    protocol.data_received(head + b"a" * MAX_TRAILER_BYTES)
    protocol.data_received(b"\r\n\r\n")
    assert transport.ended() == (None, None)


@virtual_time
async def test_a_connection_that_has_ended_is_not_aborted() -> None:
    transport = Transport()
    protocol = connected(transport)
    protocol.close()
    protocol.connection_lost(None)
    await asyncio.sleep(1000)
    assert transport.ended() == (0.0, None)


# ── how many ──────────────────────────────────────────────────────────────────────────────────────


def test_beyond_the_bound_the_connection_that_waited_longest_makes_room(
    fake_settings: Configure,
) -> None:
    with ExitStack() as stack:
        (port,) = stack.enter_context(listening(fake_settings(max_connections=3)))
        idle = [stack.enter_context(connect(port)) for _ in range(3)]
        idle[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of(one_answer(idle[0])) == 200, "this one waits since now"
        answer = all_answered(
            port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        assert status_of(answer) == 200
        assert idle[1].recv(1) == b""


def test_a_body_that_does_not_come_makes_room_too(fake_settings: Configure) -> None:
    with ExitStack() as stack:
        (port,) = stack.enter_context(listening(fake_settings(max_connections=2)))
        first, second = (stack.enter_context(connect(port)) for _ in range(2))
        for connection in (first, second):
            connection.sendall(
                b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + b"Content-Length: 99\r\n\r\n"
            )
            time.sleep(0.1)
        answer = all_answered(
            port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        assert status_of(answer) == 200
        assert first.recv(1) == b""


def test_a_connection_is_refused_if_all_have_a_request_except_on_the_operations_port(
    fake_settings: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + b"Content-Length: 18\r\n\r\n"
    request = head + b'{"prompt": "hold"}'
    probe = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with ExitStack() as stack:
        port, operations = stack.enter_context(listening(fake_settings(max_connections=2), ports=2))
        for _ in range(2):
            stack.enter_context(connect(port)).sendall(request)
        time.sleep(0.2)
        answers = [all_answered(port, b"") for _ in range(3)]
        assert [status_of(answer) for answer in answers] == [503] * 3
        assert error_of(answers[0]) == "too_many_connections"
        assert b"retry-after: " in answers[0].lower()
        assert status_of(all_answered(operations, probe)) == 200
        metrics = all_answered(operations, probe.replace(b"healthz", b"metrics"))
        assert b'paella_rejected_total{reason="too_many_connections"} 3.0' in metrics
    lines = [record for record in caplog.records if record.msg == "connection limit reached"]
    assert len(lines) == 1, "one line for many"


class Waiting:
    """A connection without a request."""

    def __init__(self, connections: Connections) -> None:
        self.connections, self.closed = connections, False
        connections.wait(self)  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed = True
        self.connections.waiting.pop(self)  # type: ignore[call-overload]


def test_the_log_counts_the_connections_closed_and_refused_since_its_last_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, refused = 1000.0, list[None]()
    monkeypatch.setattr("server.http_protocol.time.monotonic", lambda: now)
    connections = Connections(2, exempt_port=9, on_refused=lambda: refused.append(None))

    def admitted(port: int = 80) -> bool:
        return connections.admit(None, port)  # type: ignore[arg-type]

    def lines() -> list[dict[str, int]]:
        return [record.__dict__["fields"] for record in caplog.records]

    assert not admitted()
    assert lines() == [{"limit": 2, "closed": 0, "refused": 1}]
    first, second = Waiting(connections), Waiting(connections)
    assert connections.admit(first, 80), "closes the other one"  # type: ignore[arg-type]
    assert (first.closed, second.closed) == (False, True)
    assert admitted()
    assert [admitted(), admitted(), admitted(port=9)] == [False, False, True]
    now += LOGGED_EVERY_S - 0.1
    assert not admitted()
    assert len(lines()) == 1
    now += 0.1
    assert not admitted()
    assert lines()[1:] == [{"limit": 2, "closed": 2, "refused": 4}]
    assert len(refused) == 5
    now += LOGGED_EVERY_S
    assert not admitted()
    assert lines()[2:] == [{"limit": 2, "closed": 0, "refused": 1}]


def limit_descriptors(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_requests(port: int, number: int, stack: ExitStack) -> None:
    """Requests as in the report: an upgrade, and a body that does not come."""
    for _ in range(number):
        connection = stack.enter_context(connect(port))
        connection.sendall(
            b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + WEBSOCKET + b"Content-Length: 100\r\n\r\n"
        )


def test_more_clients_than_descriptors_do_not_exclude_others_and_are_logged(bundle: Path) -> None:
    with process(bundle, limit_descriptors(128, 128)) as (server, port):
        with ExitStack() as stack:
            open_requests(port, 150, stack)
            url = f"http://127.0.0.1:{port}"
            assert httpx.get(f"{url}/healthz", timeout=PATIENCE_S).status_code == 200
            answer = httpx.post(f"{url}/generate", json={"prompt": "a"}, timeout=PATIENCE_S)
            assert answer.status_code == 200
        server.terminate()
        log = [json.loads(line) for line in (server.communicate()[1]).splitlines()[1:]]
    told = [
        line for line in log if line["message"] == "connections limited by the descriptor limit"
    ]
    assert told[0]["descriptors"] == 128
    (full,) = [line for line in log if line["message"] == "connection limit reached"][:1]
    assert full["limit"] == 64


def test_the_soft_descriptor_limit_is_raised(bundle: Path) -> None:
    with process(bundle, limit_descriptors(128, 4096)) as (server, port), ExitStack() as stack:
        open_requests(port, 150, stack)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0] > 1000


def test_a_server_that_cannot_accept_says_so(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file, process(bundle, output=file) as (server, port):
        before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        # Fewer than are open, so that none is free.
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (5, before[1]))
        wait_until(lambda: b"connections not accepted" in log.read_bytes())
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
        wait_until(lambda: b"connections accepted again" in log.read_bytes())
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


# ── bodies that do not end ────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_unfinished_bodies_take_no_more_memory_than_their_budget_and_exclude_nobody(
    bundle: Path,
) -> None:
    mib = 2**20
    settings = {
        "PAELLERA_BODY_BUDGET_BYTES": str(16 * mib),
        "PAELLERA_MAX_BODY_BYTES": str(16 * mib),
    }
    head = b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + b"Content-Length: %d\r\n\r\n" % (16 * mib)
    with process(bundle, **settings) as (server, port), ExitStack() as stack:
        before = resident_mib(server.pid)
        unfinished = [stack.enter_context(connect(port)) for _ in range(8)]
        for connection in unfinished:
            connection.sendall(head + b" " * 12 * mib)
        time.sleep(0.5)
        padded = BODY + b" " * mib
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(
            f"http://127.0.0.1:{port}/generate", content=padded, headers=headers, timeout=PATIENCE_S
        )
        assert answer.status_code == 200
        assert resident_mib(server.pid) - before < 60, "96 MiB were sent"
        assert status_of(unfinished[0].recv(1000)) == 429


# ── answers that nobody reads ─────────────────────────────────────────────────────────────────────

# More than the kernel's buffers hold.
UNREAD: dict[str, Any] = {
    "prompt": "noise",
    "n": 4,
    "width": 512,
    "height": 512,
    "num_inference_steps": 1,
    "response_format": "json",
}


@contextmanager
def not_reading(
    port: int, headers: dict[str, str] | None = None, buffer_bytes: int = 4096
) -> Iterator[socket.socket]:
    """A client that sends a request for several megabytes and reads nothing of the answer."""
    body = json.dumps(UNREAD).encode()
    lines = {"Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"POST /generate HTTP/1.1\r\n" + JSON_HEAD + head + b"\r\n" + body)
        yield connection


def test_an_answer_that_nobody_reads_is_aborted_and_logged(
    fake_settings: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.access")
    with (
        served(fake_settings(send_timeout_s=0.5)) as client,
        not_reading(client.base_url.port or 0, {"X-Request-Id": "unread"}) as connection,
    ):
        said(caplog, "unread")
        received = b"".join(iter(lambda: connection.recv(100_000), b""))
    assert not is_whole(received), "what the kernel had, and then the end"
    unread = [
        record
        for record in caplog.records
        if record.__dict__.get("fields", {}).get("request_id") == "unread"
    ]
    assert [record.msg for record in unread] == ["client stalled", "request"]
    assert unread[1].fields["code"] == "client_stalled"
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_a_client_that_reads_slowly_gets_its_whole_answer(fake_settings: Configure) -> None:
    with (
        served(fake_settings(send_timeout_s=3)) as client,
        not_reading(client.base_url.port or 0, {"Connection": "close"}, 2**16) as connection,
    ):
        received = bytearray()
        began = time.monotonic()
        while piece := connection.recv(2**17):
            received += piece
            time.sleep(0.1)
        assert time.monotonic() - began > 3, "longer than the timeout of one piece"
    assert is_whole(bytes(received))


def test_a_key_s_slot_is_taken_until_its_answer_is_read(fake_settings: Configure) -> None:
    authorized = {"Authorization": f"Bearer {KEY}"}
    settings = fake_settings(api_keys=KEY, key_concurrency=1, send_timeout_s=2)
    with served(settings) as client, not_reading(client.base_url.port or 0, authorized):
        client.headers.update(authorized)
        wait_until(lambda: 'images_total{endpoint="/generate"} 4' in client.get("/metrics").text)

        def again() -> int:
            return client.post("/generate", content=BODY, headers=json_headers).status_code

        json_headers = {"Content-Type": "application/json"}
        assert again() == 429
        wait_until(lambda: again() == 200)


def test_unread_answers_do_not_keep_a_server_from_stopping(bundle: Path) -> None:
    with process(bundle, PAELLERA_LOG_LEVEL="warning") as (server, port), ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(not_reading(port))
        address = f"http://127.0.0.1:{port}"
        wait_until(
            lambda: 'images_total{endpoint="/generate"} 8' in httpx.get(f"{address}/metrics").text
        )
        began = time.monotonic()
        server.terminate()
        assert server.wait(PATIENCE_S) == 0
        assert time.monotonic() - began < 20, "the drain and send timeouts are 30 s each"


# ── stopping ──────────────────────────────────────────────────────────────────────────────────────


def test_a_stopping_server_is_not_ready_but_serves_until_its_delay_has_passed(
    bundle: Path,
) -> None:
    settings = {"PAELLERA_SHUTDOWN_DELAY_S": "3", "PAELLERA_LOG_LEVEL": "warning"}
    with process(bundle, **settings) as (server, port):
        address = f"http://127.0.0.1:{port}"
        server.terminate()
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 503)
        error = httpx.get(f"{address}/readyz").json()["error"]
        assert (error["code"], error["message"]) == ("not_ready", "the server is stopping")
        assert httpx.post(f"{address}/generate", json={"prompt": "a"}).status_code == 200
        assert server.wait(PATIENCE_S) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/healthz")
