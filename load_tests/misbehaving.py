"""Define clients that misbehave: they read slowly or nothing, send without end, or hang up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from load_tests.traffic import refused_honestly

# The kernel's part of what a slow reader has not read yet stays small, so that the rest is the
# server's to keep.
RECEIVE_BUFFER_BYTES = 4096
SIP_BYTES, SIP_EVERY_S = 256, 0.1
GULP_BYTES = 1 << 16
# Half a megabyte or more as JSON.
LARGE: Mapping[str, Any] = {"n": 16, "num_inference_steps": 2, "response_format": "json"}
SMALL: Mapping[str, Any] = {"num_inference_steps": 2}
KIB, MIB = 1 << 10, 1 << 20
# Far more than a server may read of what never ends.
ENDLESS_BYTES = 16 * MIB
WEBSOCKET = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
H2C = {
    "Connection": "Upgrade, HTTP2-Settings, close",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA",
}
CLOSED, CUT_OFF, LEFT = "closed", "cut off", "left"


@dataclass(frozen=True, slots=True)
class Client:
    """A client without an HTTP library.

    number: its number among several, which do not all do the same.
    """

    host: str
    port: int
    number: int

    async def read_slowly(self, seconds: float) -> bool:
        """Read a few bytes at a time for `seconds`, then the rest.

        Returns whether that was a whole answer, or a rejection with a Retry-After header.
        """
        loop, ends = asyncio.get_running_loop(), time.monotonic() + seconds
        async with self._connected() as connection:
            await loop.sock_sendall(connection, self._request(LARGE))
            received = bytearray()
            while sip := await loop.sock_recv(
                connection, SIP_BYTES if (slowly := time.monotonic() < ends) else GULP_BYTES
            ):
                received += sip
                await asyncio.sleep(SIP_EVERY_S if slowly else 0)
        return is_whole(bytes(received))

    async def stay_half_open(self, seconds: float) -> bool:
        """Send a part of a request, and then wait.

        By its number: nothing, half a header, half a body or all of it. Returns True: it expects no
        answer.
        """
        request = self._request(SMALL)
        sent = (b"", request[:30], request[:-10], request)[self.number % 4]
        async with self._connected() as connection:
            await asyncio.get_running_loop().sock_sendall(connection, sent)
            await asyncio.sleep(seconds)
        return True

    async def leave_after(self, seconds: float) -> None:
        """Send a request, and reset the connection after `seconds`."""
        async with self._connected() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.get_running_loop().sock_sendall(connection, self._request(SMALL))
            await asyncio.sleep(seconds)

    # ── attacks: each returns how it ended: a status, `CLOSED`, `CUT_OFF` or `LEFT` ───────────────

    async def send_endless_trailers(self) -> str:
        """Send a chunked request with trailers that do not end."""
        head = self._head({"Transfer-Encoding": "chunked", "Content-Type": "application/json"})
        body = self._body(SMALL)
        trailers = b"a: b\r\n" * (GULP_BYTES // 6)
        begun = head + b"%x\r\n%s\r\n0\r\n" % (len(body), body)
        count = ENDLESS_BYTES // len(trailers)
        return await self._exchange(itertools.chain([begun], itertools.repeat(trailers, count)))

    async def upgrade_and_say_nothing(self) -> str:
        """Ask for a WebSocket, announce a body and do not send it."""
        announced = {"Content-Type": "application/json", "Content-Length": "100"}
        return await self._exchange([self._head({**WEBSOCKET, **announced})])

    async def ask_for_http2(self) -> str:
        """Send a request that offers h2c, as Java's client does; HTTP/1.1 must answer it."""
        request = self._request(SMALL)
        upgrade = "".join(f"{name}: {value}\r\n" for name, value in H2C.items()).encode()
        return await self._exchange([request.replace(b"Connection: close\r\n", upgrade)])

    async def send_files(self, contents: Sequence[bytes], leave_after_s: float | None) -> str:
        """Post images to /variations, and leave before the answer if there is a time to."""
        files = [("image", (f"{i}.webp", content)) for i, content in enumerate(contents)]
        request = self._post("/variations", files=files)
        try:
            return await asyncio.wait_for(self._exchange([request]), leave_after_s)
        except TimeoutError:
            return LEFT

    async def read_nothing(self, seconds: float) -> str:
        """Ask for a large answer, and read it only after `seconds`."""
        async with self._connected() as connection:
            await asyncio.get_running_loop().sock_sendall(connection, self._request(LARGE))
            await asyncio.sleep(seconds)
            answer = await _read(connection)
        return _status(answer) if is_whole(answer) else CUT_OFF

    async def send_body_slowly(self, announced: int, at_once: int, pause_s: float) -> str:
        """Send so many bytes of a body at once, and then one at a time."""
        head = self._head({"Content-Type": "application/json", "Content-Length": str(announced)})
        rest = itertools.repeat(b" ", announced - at_once)
        return await self._exchange(itertools.chain([head + b" " * at_once], rest), pause_s)

    async def send_head_slowly(self, pause_s: float) -> str:
        """Send a head a byte at a time, and never its end."""
        head = self._head({"X-Filler": "a" * 10_000})
        return await self._exchange((bytes([byte]) for byte in head), pause_s)

    async def send_deep_form(self) -> str:
        """Post a form of 64 texts with as much structure as fits."""
        nested = "[" + "[]," * (128 * KIB // 3 - 1) + "[]"
        texts = [(f"field{number}", (None, nested)) for number in range(64)]
        return await self._exchange([self._post("/edit", files=texts)])

    async def send_long_list(self) -> str:
        """Post a list of 131,072 numbers where a few images are allowed."""
        return await self._exchange([self._request({"references": [1] * 131_072})])

    async def call_as_foreign_page(self) -> str:
        """Post what a browser sends for a page of another site, or of a name that is rebound."""
        foreign = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
        rebound = {"Host": f"evil.example:{self.port}"}
        headers = foreign if self.number % 2 else rebound
        return await self._exchange([self._post("/generate", headers, json={"prompt": "a"})])

    async def _exchange(self, pieces: Iterable[bytes], pause_s: float = 0) -> str:
        """Send the pieces with pauses, and then read. Return the status, or `CLOSED`."""
        loop = asyncio.get_running_loop()
        async with self._connected() as connection:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    await loop.sock_sendall(connection, piece)
                    await asyncio.sleep(pause_s)
            return _status(await _read(connection))

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[socket.socket]:
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
            yield connection

    def _request(self, fields: Mapping[str, Any]) -> bytes:
        body = self._body(fields)
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return self._head({**lines, "Connection": "close"}) + body

    def _body(self, fields: Mapping[str, Any]) -> bytes:
        return json.dumps({"prompt": "a red ball", "seed": self.number, **fields}).encode()

    def _head(self, headers: Mapping[str, str]) -> bytes:
        lines = {"Host": self.host, **headers}
        fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST /generate HTTP/1.1\r\n{fields}\r\n".encode()

    def _post(self, path: str, headers: Mapping[str, str] | None = None, **content: Any) -> bytes:
        """Return the bytes of a request with the content that httpx makes of its arguments."""
        closing = {"Connection": "close", **(headers or {})}
        url = f"http://{self.host}:{self.port}{path}"
        request = httpx.Request("POST", url, headers=closing, **content)
        lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + request.read()


async def _read(connection: socket.socket) -> bytes:
    """Return everything until the server closes the connection, or resets it."""
    received = bytearray()
    with contextlib.suppress(OSError):
        while piece := await asyncio.get_running_loop().sock_recv(connection, GULP_BYTES):
            received += piece
    return bytes(received)


def _status(answer: bytes) -> str:
    return answer.split(b" ", 2)[1].decode("latin-1") if answer.startswith(b"HTTP/") else CLOSED


def is_whole(answer: bytes) -> bool:
    """Return whether these are all bytes of a 200 answer, or of a rejection with Retry-After."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if headers.get("content-length") != str(len(body)):
        return False
    status = int(status_line.split()[1])
    return status == 200 or refused_honestly(status, headers)
