"""The HTTP server, which tells the engine that it is to stop at once and not, as uvicorn alone would, when the last request is through."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI

from server.api.state import AppState

# For answers to be written, once the engine has given them.
WRITING_S = 5


class Server(uvicorn.Server):
    """From SIGTERM or SIGINT on, requests have `drain_timeout_s`; those that need more get 503."""

    def __init__(self, api: FastAPI) -> None:
        self._state: AppState = api.state.paellera
        grace = math.ceil(self._state.settings.drain_timeout_s) + WRITING_S
        super().__init__(uvicorn.Config(api, access_log=False, log_config=None, timeout_graceful_shutdown=grace))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._state.engine.stop())
        await super().shutdown(sockets)
        # A second Ctrl-C does not wait.
        if not self.force_exit:
            await draining
