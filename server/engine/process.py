"""One worker as a child process, seen from the event loop: messages in and out, and its end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

from server.engine.protocol import FromWorker, Stop, ToWorker
from server.engine.spinning import bound_spinning
from server.engine.wire import receive, send
from server.settings import Settings

log = logging.getLogger(__name__)

WorkerMain = Callable[[Connection, Settings], None]

EXIT_GRACE_S = 5.0


def run_worker(connection: Connection, settings: Settings) -> None:
    """What a worker process runs. The import waits until here because it brings torch, which the API process does without."""
    bound_spinning()
    from server.engine.worker import main

    main(connection, settings)


def _run(main: WorkerMain, connection: Connection, settings: Settings) -> None:
    # A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the group, but only the parent decides when the worker
    # stops: after the drain.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    main(connection, settings)


class WorkerProcess:
    """A started child.

    Sending and receiving have a thread each, since a pipe blocks when its other end is busy and the event loop must not.
    exited: its exit code, once it is gone and every message it sent has been handed to `on_message`.
    """

    def __init__(self, main: WorkerMain, settings: Settings, on_message: Callable[[FromWorker], None]) -> None:
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._on_message = on_message
        self._outbox: SimpleQueue[ToWorker | None] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._connection, self._far_end = context.Pipe()
        self._process = context.Process(target=_run, args=(main, self._far_end, settings), name="paellera-worker", daemon=True)
        self._sender = threading.Thread(target=self._send_all, name="worker-sender", daemon=True)
        self._receiver = threading.Thread(target=self._receive_all, name="worker-receiver", daemon=True)

    def start(self) -> None:
        """Raises OSError if the system grants no process."""
        try:
            self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            # The pipe reports the child's end only if nobody else holds the child's side of it.
            self._far_end.close()
        # An exiting interpreter sends its children SIGTERM and waits for them; this one ignores that.
        atexit.register(self.kill)
        self._sender.start()
        self._receiver.start()

    def send(self, message: ToWorker) -> None:
        """Queues the message; lost without a sound if the worker is gone, which `exited` tells."""
        self._outbox.put(message)

    def kill(self) -> None:
        self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """Asks the worker to exit, and after `grace_s` makes it."""
        self.send(Stop())
        await asyncio.wait([self.exited], timeout=grace_s)
        if not self.exited.done():
            self.kill()
            await self.exited

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):
                send(self._connection, message)

    def _receive_all(self) -> None:
        loop = self.exited.get_loop()
        try:
            while True:
                loop.call_soon_threadsafe(self._on_message, receive(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("a worker's message cannot be read; the worker is killed")
            self.kill()
        self._reap()
        # The loop is closed already when an interpreter exits without having stopped the client.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self.exited.set_result, self._process.exitcode)

    def _reap(self) -> None:
        self._process.join(EXIT_GRACE_S)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
        atexit.unregister(self.kill)
        self._outbox.put(None)
        self._sender.join()
        self._connection.close()
