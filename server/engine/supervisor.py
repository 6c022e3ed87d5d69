"""Keep one worker process alive: start it, detect a crash or a stall, replace it.

The listener learns of lost jobs, and which of them are suspects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Protocol

from server.engine.job import Job
from server.engine.messages import (
    Cancel,
    Crashed,
    Drawn,
    Dropped,
    Failed,
    Finished,
    FromWorker,
    Heartbeat,
    Preview,
    Ready,
    Running,
    ShareCPU,
)
from server.engine.worker_process import EXIT_GRACE_S, WorkerMain, WorkerProcess
from server.metrics import Metrics, WorkerState
from server.settings import Settings

log = logging.getLogger(__name__)

# The messages that concern jobs, and are passed on.
WorkerMessage = Running | Preview | Drawn | Finished | Failed | Heartbeat

FIRST_RESTART_DELAY_S = 0.1
LAST_RESTART_DELAY_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's state: whether a job sent now would be started, and if not, why.

    device, dtype: the worker's, None before it is first ready. fatal: why no worker can be started
    any more: the first start failed and every other would too, or the supervisor itself failed.
    """

    ready: bool
    reason: str
    device: str | None = None
    dtype: str | None = None
    fatal: str | None = None


class Listener(Protocol):
    """The receiver of a supervisor's events, called on the event loop."""

    def on_worker_ready(self, worker: Supervisor) -> None:
        """Handle a worker that accepts jobs from now on."""

    def on_rows_owed(self, worker: Supervisor) -> None:
        """Handle a change of what the worker has to compute, before it learns of it."""

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
        self,
        main: WorkerMain,
        settings: Settings,
        metrics: Metrics,
        listener: Listener,
        index: int = 0,
    ) -> None:
        """Create the supervisor. index: the worker's, for the log; in `PAELLERA_DEVICES`."""
        self._index = index
        self._main, self._settings = main, settings
        self._metrics, self._listener = metrics, listener
        self._status = WorkerStatus(ready=False, reason="starting")
        self._failure: str | None = None  # why workers are no longer watched and replaced
        self._tasks: list[asyncio.Task[None]] = []
        self.last_heartbeat = Heartbeat((), 0, 0)
        self.failures = 0
        # Rows of the jobs that the worker has not answered, cancelled ones included.
        self._owed: dict[str, int] = {}
        self._sharing = 1  # workers on its CPU, as it was told
        self._was_ready = False
        self._cancelled_at: dict[str, float] = {}
        self._running: tuple[str, ...] = ()
        self._started_at = 0.0
        # The worker's last message; None while it is not ready. An idle worker sends heartbeats.
        self._heard_at: float | None = None
        # Why this worker ends: its own last message, or the supervisor's for killing it.
        self._crash: Crashed | None = None
        self._killed_for: str | None = None

    async def start(self) -> None:
        """Start the first worker and return before it is ready.

        Raises OSError if the system grants no process.
        """
        self._worker = self._start_worker()
        self._tasks = [
            asyncio.create_task(self._keep_alive()),
            asyncio.create_task(self._watch()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_ended)

    async def stop(self) -> None:
        """Stop the worker, if one was started; it is not replaced."""
        if not self._tasks:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # One that is not ready is loading weights and reads no messages.
        await self._worker.stop(EXIT_GRACE_S if self._status.ready else 0)

    @property
    def status(self) -> WorkerStatus:
        """The worker's state, for probes and for dispatching."""
        if self._failure:
            return replace(self._status, ready=False, reason=self._failure, fatal=self._failure)
        if self._status.ready and self._stalled:
            return WorkerStatus(False, self._silence, self._status.device, self._status.dtype)
        return self._status

    @property
    def state(self) -> WorkerState:
        """The worker's figures for /metrics."""
        silent_s = 0.0 if self._heard_at is None else time.monotonic() - self._heard_at
        return WorkerState(self.status.ready, silent_s, self.last_heartbeat.stats)

    @property
    def accepting(self) -> bool:
        """Return whether the worker reads jobs, at once or after its current step."""
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
        self._owed[job.id] = job.rows
        self._listener.on_rows_owed(self)
        self._worker.send(job)

    @property
    def computes_on_cpu(self) -> bool:
        """Return whether it has something to compute, on the CPU."""
        return bool(self._owed) and self._status.device == "cpu"

    def share_cpu(self, workers: int) -> None:
        """Tell the worker how many workers compute on its CPU, unless it knows."""
        if workers != self._sharing:
            self._sharing = workers
            self._worker.send(ShareCPU(workers))

    def cancel(self, id: str) -> None:
        """Free the job's slots at the next step, if the worker has it."""
        if id in self._owed and id not in self._cancelled_at:
            self._cancelled_at[id] = time.monotonic()
            self._worker.send(Cancel(id))

    # ── messages ──────────────────────────────────────────────────────────────────────────────────

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Ready(device, dtype, threads, compiled):
                fields = {
                    "worker": self._index,
                    "load_s": round(time.monotonic() - self._started_at, 1),
                    "device": device,
                    "dtype": dtype,
                    "threads": threads,
                    "compiled": compiled,
                }
                log.info("worker ready", extra={"fields": fields})
                self._status = WorkerStatus(True, "ready", device, dtype)
                self._was_ready = True
                self._listener.on_worker_ready(self)
            case Crashed():
                self._crash = message
            case Finished(id=id) | Failed(id=id):
                self.failures = 0
                self._answered(id)
            case Dropped(id):
                self._answered(id)
                if cancelled_at := self._cancelled_at.pop(id, None):
                    self._metrics.cancel_duration.observe(time.monotonic() - cancelled_at)
            case Running(jobs):
                self._running = jobs
            case Heartbeat():
                self.last_heartbeat = message
        if isinstance(message, WorkerMessage):
            self._listener.on_worker_message(self, message)
        self._heard_at = time.monotonic() if self._status.ready else None

    def _answered(self, id: str) -> None:
        if self._owed.pop(id, None) is not None:
            self._listener.on_rows_owed(self)

    # ── crashes and stalls ────────────────────────────────────────────────────────────────────────

    @property
    def _stalled(self) -> bool:
        if self._heard_at is None:
            return False
        return time.monotonic() - self._heard_at > self._settings.stall_timeout_s

    @property
    def _silence(self) -> str:
        return f"the worker has not answered for {self._settings.stall_timeout_s:g} s"

    @property
    def _start_expired(self) -> bool:
        loading = not self._status.ready and not self._worker.exited.done()
        return loading and time.monotonic() - self._started_at > self._settings.start_timeout_s

    def _start_worker(self) -> WorkerProcess:
        worker = WorkerProcess(self._main, self._settings, self._on_message)
        worker.start()
        self._started_at, self._crash, self._killed_for = time.monotonic(), None, None
        return worker

    async def _keep_alive(self) -> None:
        """Replace every worker that exits, each time after a longer delay."""
        while True:
            code = await asyncio.shield(self._worker.exited)
            self._lose(self._reason(code))
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

    def _on_task_ended(self, task: asyncio.Task[None]) -> None:
        """Report an error that ended the supervision, since nobody awaits its tasks."""
        if task.cancelled() or not (error := task.exception()):
            return
        log.error("worker supervision failed", exc_info=error)
        self._failure = f"worker supervision failed: {error!r}"

    def _reason(self, code: int | None) -> str:
        """Return why the worker has exited, in words."""
        if self._killed_for:
            return f"{self._killed_for} and was killed"
        if self._crash:
            event = "crashed" if self._status.ready else "did not start"
            return f"the worker {event}: {self._crash.reason}"
        return f"the worker exited with code {code}"

    def _lose(self, reason: str) -> None:
        unfinished = frozenset(self._owed) - self._cancelled_at.keys()
        suspects = unfinished & frozenset(self._running)
        fields = {"reason": reason, "unfinished": len(unfinished), "suspects": sorted(suspects)}
        log.error("worker lost", extra={"fields": fields})
        first = not self._was_ready and not self.failures
        fatal = reason if first and self._crash and self._crash.lasting else None
        self._status = WorkerStatus(False, f"{reason}; another is starting", fatal=fatal)
        self._owed, self._cancelled_at, self._sharing = {}, {}, 1
        self._running = ()
        self._heard_at, self.last_heartbeat = None, Heartbeat((), 0, 0)
        self._listener.on_rows_owed(self)
        self._listener.on_worker_lost(self, reason, unfinished, suspects)

    async def _watch(self) -> None:
        """Kill a worker that is silent, or not ready, for too long."""
        interval = min(self._settings.stall_timeout_s, self._settings.start_timeout_s) / 4
        while True:
            began = time.monotonic()
            await asyncio.sleep(interval)
            if time.monotonic() - began > 2 * interval:
                # This process stood still, and the worker's messages are yet to be read.
                self._heard_at = self._heard_at and time.monotonic()
            elif self._stalled:
                self._kill("worker stalled", self._silence)
            elif self._start_expired:
                limit = f"{self._settings.start_timeout_s:g} s"
                self._kill("worker start timed out", f"the worker was not ready after {limit}")

    def _kill(self, event: str, reason: str) -> None:
        if self._killed_for is None:
            log.error(event, extra={"fields": {"reason": reason}})
        self._killed_for = reason
        self._worker.kill()
