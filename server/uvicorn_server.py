"""The HTTP server process: uvicorn with bounded request heads and a drain that starts at once."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.middleware import MAX_HEADER_BYTES, MAX_URL_BYTES
from server.api.state import AppState

# Seconds for writing answers after the engine has stopped.
WRITE_TIMEOUT_S = 5


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers exceed the limits.

    `middleware.Guard` answers requests that end within both limits together but exceed one of them.

    Attributes:
        head_timeout_s: seconds for a request's head, from the start of the connection or the end
            of the last answer.
    """

    head_timeout_s: float

    _unfinished_bytes = 0
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request's head."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of an unfinished head; answer 400 beyond the limit."""
        super().data_received(data)
        self._unfinished_bytes = self._unfinished_bytes + len(data) if self._in_head else 0
        if self._unfinished_bytes > MAX_URL_BYTES + MAX_HEADER_BYTES:
            self.send_400_response("The request's headers are too long.")

    def on_message_begin(self) -> None:
        """Note the start of a head."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """Note the end of a head."""
        super().on_headers_complete()
        self._in_head = False
        self._stop_timer()

    def on_response_complete(self) -> None:
        """Start the timeout of the next request's head."""
        super().on_response_complete()
        self._start_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _on_timeout(self) -> None:
        # The last of several pipelined requests may still wait for its answer.
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_timer()
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """Drains on SIGTERM and SIGINT: requests have `drain_timeout_s`, later ones get 503.

    The engine learns of it at once; uvicorn alone would tell it after the last request.

    Attributes:
        failure: why no worker can ever start, if that ended the server.
    """

    failure: str | None = None

    def __init__(self, api: FastAPI) -> None:
        self._state: AppState = api.state.paellera
        settings = self._state.settings

        class Protocol(BoundedProtocol):
            head_timeout_s = settings.receive_timeout_s

        config = uvicorn.Config(
            api,
            http=Protocol,
            access_log=False,
            log_config=None,
            server_header=False,
            # The app's own middleware does it (`origins.TrustedProxies`).
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s) + WRITE_TIMEOUT_S,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop: told to, or no worker can ever start."""
        status = self._state.engine.status()
        if status.fatal and not self.should_exit:
            self.failure = status.fatal
        return await super().on_tick(counter) or self.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the engine and the connections; a second signal does not wait."""
        draining = asyncio.create_task(self._state.engine.stop())
        await super().shutdown(sockets)
        if not self.force_exit:
            await draining
