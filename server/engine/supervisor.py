"""Keep one worker process alive: start it, detect a crash or a stall, replace it.

The listener learns of lost jobs, and which of them are suspects.

The API process never imports torch: the worker's code is imported in the child process.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

from server.engine.messages import (
    Cancel,
    Drawn,
    Dropped,
    Failed,
    Finished,
    FromWorker,
    Heartbeat,
    Job,
    Preview,
    Ready,
    Running,
    Stop,
    ToWorker,
    receive_message,
    send_message,
)
from server.metrics import Metrics, WorkerState
from server.settings import Settings

log = logging.getLogger(__name__)

WorkerMain = Callable[[Connection, Settings], None]
# The messages that concern jobs, and are passed on.
WorkerMessage = Running | Preview | Drawn | Finished | Failed | Heartbeat

EXIT_GRACE_S = 5.0
FIRST_RESTART_DELAY_S = 0.1
LAST_RESTART_DELAY_S = 30.0

# OpenMP's spin count, measured: a smaller one slows an undisturbed step, a larger one a disturbed
# step (docs/log.md).
SPIN_COUNT = 10_000


def limit_spin_count() -> None:
    """Let waiting OpenMP threads sleep sooner; call it before torch is imported.

    By default they spin for longer than the kernel lets another process compute, and take the cores
    from the threads that they wait for. The environment's own settings take precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def run_worker(connection: Connection, settings: Settings) -> None:
    """Run a worker in this process, which has no torch before."""
    limit_spin_count()
    from server.engine.worker import main

    main(connection, settings)


def _run(main: WorkerMain, connection: Connection, settings: Settings) -> None:
    # A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the group, but only
    # the parent decides when the worker stops: after the drain.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    main(connection, settings)


class WorkerProcess:
    """A started child process.

    Sending and receiving have a thread each, since a pipe blocks when its other end is busy and the
    event loop must not. exited: its exit code, once it has exited and every message it sent has
    been passed to `on_message`.
    """

    def __init__(
        self, main: WorkerMain, settings: Settings, on_message: Callable[[FromWorker], None]
    ) -> None:
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._on_message = on_message
        self._outbox: SimpleQueue[ToWorker | None] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._connection, self._far_end = context.Pipe()
        self._process = context.Process(
            target=_run, args=(main, self._far_end, settings), name="paellera-worker", daemon=True
        )
        self._sender = threading.Thread(target=self._send_all, name="worker-sender", daemon=True)
        self._receiver = threading.Thread(
            target=self._receive_all, name="worker-receiver", daemon=True
        )

    def start(self) -> None:
        """Start the process. Raises OSError if the system grants none."""
        try:
            self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            # The pipe reports the child's end only if no other process holds the child's side of
            # it.
            self._far_end.close()
        # An exiting interpreter sends its children SIGTERM and waits for them; this one ignores
        # that.
        atexit.register(self.kill)
        self._sender.start()
        self._receiver.start()

    def send(self, message: ToWorker) -> None:
        """Queue the message.

        A message to a worker that has exited is lost; `exited` reports the exit.
        """
        self._outbox.put(message)

    @property
    def pid(self) -> int | None:
        """Return the process's number, None before it is started."""
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """Ask the worker to exit; kill it after `grace_s`."""
        self.send(Stop())
        await asyncio.wait([self.exited], timeout=grace_s)
        if not self.exited.done():
            self.kill()
            await self.exited

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):
                send_message(self._connection, message)

    def _receive_all(self) -> None:
        loop = self.exited.get_loop()
        try:
            while True:
                loop.call_soon_threadsafe(self._on_message, receive_message(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("worker killed: unreadable message")
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


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Whether a job sent now would be started, and if not, why.

    device, dtype: the worker's, None before it is first ready.
    """

    ready: bool
    reason: str
    device: str | None = None
    dtype: str | None = None


class Listener(Protocol):
    """The receiver of a supervisor's events, called on the event loop."""

    def on_worker_ready(self, worker: Supervisor) -> None:
        """Handle a worker that accepts jobs from now on."""

    def on_worker_message(self, worker: Supervisor, message: WorkerMessage) -> None:
        """Handle a message about jobs."""

    def on_worker_lost(
        self, worker: Supervisor, reason: str, unfinished: frozenset[str], suspects: frozenset[str]
    ) -> None:
        """Handle the loss of unfinished jobs.

        suspects: those of them in the stage in which the worker died.
        """


class Supervisor:
    """A sequence of workers on one device, one alive at a time."""

    def __init__(
        self, main: WorkerMain, settings: Settings, metrics: Metrics, listener: Listener
    ) -> None:
        self._main, self._settings = main, settings
        self._metrics, self._listener = metrics, listener
        self._status = WorkerStatus(ready=False, reason="starting")
        self.last_heartbeat = Heartbeat((), 0, 0)
        self.failures = 0
        # Rows of the jobs that the worker has not answered, cancelled ones included.
        self._owed: dict[str, int] = {}
        self._cancelled_at: dict[str, float] = {}
        self._running: tuple[str, ...] = ()
        # Since when the worker should have sent a message; None while it has nothing to do.
        self._silent_since: float | None = None

    async def start(self) -> None:
        """Start the first worker and return before it is ready.

        Raises OSError if the system grants no process.
        """
        self._worker = self._start_worker()
        self._tasks = [
            asyncio.create_task(self._keep_alive()),
            asyncio.create_task(self._watch_for_stalls()),
        ]

    async def stop(self) -> None:
        """Stop the worker; it is not replaced."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # One that is not ready is loading weights and reads no messages.
        await self._worker.stop(EXIT_GRACE_S if self._status.ready else 0)

    @property
    def status(self) -> WorkerStatus:
        """The worker's state, for probes and for dispatching."""
        if self._status.ready and self._stalled:
            silent = f"the worker has not answered for {self._settings.stall_timeout_s:g} s"
            return WorkerStatus(False, silent, self._status.device, self._status.dtype)
        return self._status

    @property
    def state(self) -> WorkerState:
        """The worker's figures for /metrics."""
        silent_s = 0.0 if self._silent_since is None else time.monotonic() - self._silent_since
        return WorkerState(self.status.ready, silent_s, self.last_heartbeat.stats)

    @property
    def accepting(self) -> bool:
        """Whether the worker reads jobs, at once or after its current step."""
        return self._status.ready

    @property
    def pid(self) -> int | None:
        """Return the number of the present worker's process."""
        return self._worker.pid

    @property
    def rows_owed(self) -> int:
        """Rows that the worker has not answered."""
        return sum(self._owed.values())

    def send(self, job: Job) -> None:
        """Send the worker a job."""
        self._owed[job.id] = len(job.seeds)
        self._silent_since = self._silent_since or time.monotonic()
        self._worker.send(job)

    def cancel(self, id: str) -> None:
        """Free the job's slots at the next step, if the worker has it."""
        if id in self._owed and id not in self._cancelled_at:
            self._cancelled_at[id] = time.monotonic()
            self._worker.send(Cancel(id))

    # ── messages ──────────────────────────────────────────────────────────────────────────────────

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Ready(device, dtype):
                self._status = WorkerStatus(True, "ready", device, dtype)
                self._listener.on_worker_ready(self)
            case Finished(id=id) | Failed(id=id):
                self.failures = 0
                self._owed.pop(id, None)
                self._listener.on_worker_message(self, message)
            case Dropped(id):
                self._owed.pop(id, None)
                if cancelled_at := self._cancelled_at.pop(id, None):
                    self._metrics.cancel_duration.observe(time.monotonic() - cancelled_at)
            case Running(jobs):
                self._running = jobs
                self._listener.on_worker_message(self, message)
            case Preview() | Drawn():
                self._listener.on_worker_message(self, message)
            case Heartbeat():
                self.last_heartbeat = message
                self._listener.on_worker_message(self, message)
        self._silent_since = time.monotonic() if self._owed else None

    # ── crashes and stalls ────────────────────────────────────────────────────────────────────────

    @property
    def _stalled(self) -> bool:
        if self._silent_since is None:
            return False
        return time.monotonic() - self._silent_since > self._settings.stall_timeout_s

    def _start_worker(self) -> WorkerProcess:
        worker = WorkerProcess(self._main, self._settings, self._on_message)
        worker.start()
        return worker

    async def _keep_alive(self) -> None:
        """Replace every worker that exits, each time after a longer delay."""
        while True:
            code = await asyncio.shield(self._worker.exited)
            self._lose(f"the worker exited with code {code}")
            while True:
                self.failures += 1
                await asyncio.sleep(
                    min(LAST_RESTART_DELAY_S, FIRST_RESTART_DELAY_S * 2**self.failures)
                )
                try:
                    self._worker = self._start_worker()
                    break
                except OSError:
                    log.exception("worker not started")
            self._metrics.worker_restarts.inc()

    def _lose(self, reason: str) -> None:
        unfinished = frozenset(self._owed) - self._cancelled_at.keys()
        suspects = unfinished & frozenset(self._running)
        fields = {"reason": reason, "unfinished": len(unfinished), "suspects": sorted(suspects)}
        log.error("worker lost", extra={"fields": fields})
        self._status = WorkerStatus(ready=False, reason=f"{reason}; another is starting")
        self._owed, self._cancelled_at = {}, {}
        self._running = ()
        self._silent_since, self.last_heartbeat = None, Heartbeat((), 0, 0)
        self._listener.on_worker_lost(self, reason, unfinished, suspects)

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(self._settings.stall_timeout_s / 4)
            if self._stalled:
                log.error(
                    "worker stalled", extra={"fields": {"silent_s": self._settings.stall_timeout_s}}
                )
                self._worker.kill()
