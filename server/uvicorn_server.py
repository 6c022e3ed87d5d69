"""The HTTP server process: uvicorn with bounded connections and a drain that starts at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import socket
import time

import uvicorn
from fastapi import FastAPI
from uvicorn.lifespan.on import LifespanOn, LifespanSendMessage

from server.api.state import AppState
from server.http_protocol import BoundedProtocol, Connections

log = logging.getLogger(__name__)

# Seconds for writing answers after the engine has stopped.
WRITE_TIMEOUT_S = 5
# Descriptors for all but connections: the event loop, listeners, workers, log, weights.
RESERVED_DESCRIPTORS = 64
MIN_CONNECTIONS = 16


class Server(uvicorn.Server):
    """Drains on SIGTERM, SIGINT and SIGHUP: requests have `drain_timeout_s`, later ones get 503.

    The engine learns of it at once; uvicorn alone would tell it after the last request. Before
    that, the server is not ready for `shutdown_delay_s`, but serves.

    Attributes:
        failure: why no worker can ever start, if that ended the server.
    """

    failure: str | None = None

    def __init__(self, api: FastAPI) -> None:
        self._api = api
        self._state: AppState = api.state.paellera
        settings = self._state.settings
        refused = self._state.metrics.rejected.labels("too_many_connections")
        connections = Connections(
            possible_connections(settings.max_connections), settings.operations_port, refused.inc
        )
        self._accepting = True

        class Protocol(BoundedProtocol):
            all = connections
            head_timeout_s = settings.receive_timeout_s

        class Lifespan(LifespanOn):
            async def send(self, message: LifespanSendMessage) -> None:
                # Instead of a traceback, the command line prints the system's error as one line.
                if message["type"] == "lifespan.startup.failed" and api.state.start_error:
                    message["message"] = ""
                await super().send(message)

        config = uvicorn.Config(
            api,
            http=Protocol,
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            # The app's own middleware does it (`origins.TrustedProxies`).
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive_s,
            # `_abort_unread` comes first; this is for what it does not end.
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s) + 2 * WRITE_TIMEOUT_S,
        )
        config.load()
        config.lifespan_class = Lifespan
        super().__init__(config)

    @property
    def start_error(self) -> str | None:
        """Why the system granted no worker process at the start, if that ended the server."""
        error: OSError | None = self._api.state.start_error
        if error is None:
            return None
        return f"no worker process could be started: {error.strerror or error}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app and accept connections; if the app fails to start, stop."""
        with contextlib.suppress(SystemExit):
            await super().startup(sockets)
        self.should_exit = self.should_exit or not self.started

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop: told to, or no worker can ever start.

        Once a second, log whether connections can be accepted.
        """
        if counter % 10 == 0:
            self._check_descriptors()
        status = self._state.engine.status()
        if status.fatal and not self.should_exit:
            self.failure = status.fatal
        return await super().on_tick(counter) or self.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the engine and the connections; a second SIGINT does not wait."""
        self._state.stopping.set()
        await self._serve_until_unlisted()
        draining = asyncio.create_task(self._state.engine.stop())
        aborting = asyncio.create_task(self._abort_unread(draining))
        await super().shutdown(sockets)
        aborting.cancel()
        if not self.force_exit:
            await draining

    async def _serve_until_unlisted(self) -> None:
        """Serve for `shutdown_delay_s`, until load balancers have seen /readyz fail."""
        ends = time.monotonic() + self._state.settings.shutdown_delay_s
        counter = 0
        while time.monotonic() < ends and not (self.force_exit or self.failure):
            counter += 1
            await self.on_tick(counter)
            await asyncio.sleep(0.1)

    async def _abort_unread(self, draining: asyncio.Task[None]) -> None:
        """Abort the connections whose clients do not read their answers once all are made."""
        await asyncio.wait([draining])
        await asyncio.sleep(WRITE_TIMEOUT_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _check_descriptors(self) -> None:
        # uvloop drops connections silently if it has no descriptor for them.
        try:
            socket.socket().close()
        except OSError as error:
            if self._accepting:
                log.error("connections not accepted", extra={"fields": {"reason": str(error)}})
            self._accepting = False
        else:
            if not self._accepting:
                log.warning("connections accepted again")
            self._accepting = True


def possible_connections(wanted: int) -> int:
    """Raise the soft limit of descriptors for so many connections; return how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = max(min(wanted, soft - RESERVED_DESCRIPTORS), MIN_CONNECTIONS)
    if possible < wanted:
        fields = {"descriptors": soft, "wanted": wanted, "connections": possible}
        log.warning("connections limited by the descriptor limit", extra={"fields": fields})
    return possible
