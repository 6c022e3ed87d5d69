"""The HTTP server, which tells the engine that it is to stop at once and not, as uvicorn alone would, when the last request is through."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.limits import MAX_HEADER_BYTES, MAX_URL_BYTES
from server.api.state import AppState

# For answers to be written, once the engine has given them.
WRITING_S = 5


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request line and headers do not end within the bounds; those that do are for `limits.Guard` to judge."""

    _unfinished = 0
    _in_head = True

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


class Server(uvicorn.Server):
    """From SIGTERM or SIGINT on, requests have `drain_timeout_s`; those that need more get 503."""

    def __init__(self, api: FastAPI) -> None:
        self._state: AppState = api.state.paellera
        grace = math.ceil(self._state.settings.drain_timeout_s) + WRITING_S
        proxies = self._state.settings.trusted_proxies
        config = uvicorn.Config(
            api,
            http=BoundedProtocol,
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
