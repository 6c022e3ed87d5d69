"""Define clients that misbehave: they read slowly, stop in the middle of a request, or hang up."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from load_tests.traffic import refused_honestly

# The kernel's part of what a slow reader has not read yet stays small, so that the rest is the
# server's to keep.
RECEIVE_BUFFER_BYTES = 4096
SIP_BYTES, SIP_EVERY_S = 256, 0.1
GULP_BYTES = 1 << 16
# Half a megabyte or more as JSON.
LARGE: Mapping[str, Any] = {"n": 16, "num_inference_steps": 2, "response_format": "json"}
SMALL: Mapping[str, Any] = {"num_inference_steps": 2}


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

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[socket.socket]:
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
            yield connection

    def _request(self, fields: Mapping[str, Any]) -> bytes:
        body = json.dumps({"prompt": "a red ball", "seed": self.number, **fields}).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(body)}\r\n"
        )
        return head.encode() + b"Connection: close\r\n\r\n" + body


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
