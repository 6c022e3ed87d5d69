"""The HTTP server, which tells the engine that it is to stop at once and not, as uvicorn alone would, when the last request is through."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.auth import MAX_HEADER_BYTES, MAX_URL_BYTES
from server.api.state import AppState

# For answers to be written, once the engine has given them.
WRITING_S = 5


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers do not end within the bounds; those that do are for `limits.Guard` to judge.

    head_timeout_s: from the connection's beginning, or from the last answer's end.
    """

    head_timeout_s: float

    _unfinished = 0
    _in_head = True
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._unfinished = self._unfinished + len(data) if self._in_head else 0
        if self._unfinished > MAX_URL_BYTES + MAX_HEADER_BYTES:
            self.send_400_response("The request's headers are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._head_came()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def _await_head(self) -> None:
        self._head_came()
        self._head_due = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _head_came(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()

    def _head_is_late(self) -> None:
        # Of requests that came close behind one another the last may wait for its answer still.
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """From SIGTERM or SIGINT on, requests have `drain_timeout_s`; those that need more get 503."""

    def __init__(self, api: FastAPI) -> None:
        self._state: AppState = api.state.paellera
        settings = self._state.settings
        grace = math.ceil(settings.drain_timeout_s) + WRITING_S
        proxies = settings.trusted_proxies

        class Protocol(BoundedProtocol):
            head_timeout_s = settings.receive_timeout_s

        config = uvicorn.Config(
            api,
            http=Protocol,
            access_log=False,
            log_config=None,
            server_header=False,
            # Said even when there are none: uvicorn would believe a proxy on this machine.
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies,
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._state.engine.stop())
        await super().shutdown(sockets)
        # A second Ctrl-C does not wait.
        if not self.force_exit:
            await draining
