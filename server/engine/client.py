"""The API process's side of the engine: admits jobs, hands them to the worker, and keeps a worker alive."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace

from server.engine.errors import DeadlineExceeded, Draining, EngineError, JobFailed, QueueFull, Starting, WorkerLost
from server.engine.process import EXIT_GRACE_S, WorkerMain, WorkerProcess, run_worker
from server.engine.protocol import Beat, Cancel, Failed, Finished, FromWorker, Job, Ready
from server.metrics import Metrics
from server.settings import Settings

log = logging.getLogger(__name__)

FIRST_RESTART_DELAY_S = 0.1
LAST_RESTART_DELAY_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether a job sent now would be started, and if not, why. device, dtype: the worker's, None until it has said so."""

    ready: bool
    reason: str
    device: str | None = None
    dtype: str | None = None


@dataclass(slots=True)
class _Pending:
    """An unfinished job. sent_at: when the worker was given it, None before."""

    job: Job
    arrived_at: float
    answer: asyncio.Future[Finished | EngineError]
    sent_at: float | None = None

    @property
    def rows(self) -> int:
        return len(self.job.seeds)

    @property
    def owed(self) -> bool:
        """Whether the worker has it and has not answered. A future is also done when whoever awaited it was cancelled."""
        return self.sent_at is not None and (not self.answer.done() or self.answer.cancelled())

    def resolve(self, answer: Finished | EngineError) -> None:
        # Whoever awaited it may be cancelled in the same turn of the loop.
        if not self.answer.done():
            self.answer.set_result(answer)


@dataclass(slots=True)
class _Pace:
    """Seconds the worker takes per row, averaged over about the last ten jobs; a fifth of a second before anything is measured."""

    seconds: float = 0.2
    rows: float = 1.0
    last_finish: float = field(default_factory=time.monotonic)

    def record(self, entry: _Pending) -> None:
        now = time.monotonic()
        began = max(self.last_finish, entry.sent_at or now)
        self.seconds = 0.9 * self.seconds + now - began
        self.rows = 0.9 * self.rows + entry.rows
        self.last_finish = now

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows


class EngineClient:
    """Runs jobs in one worker process, which is replaced whenever it dies or stalls. To be used from one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None, worker: WorkerMain = run_worker) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._worker_main = worker
        self._pending: dict[str, _Pending] = {}
        self._pace = _Pace()
        self._rows_running = 0
        self._draining = False
        self._failures = 0
        self._ready = asyncio.Event()
        self._status = EngineStatus(ready=False, reason="starting")
        # Since when the worker owes a sign of life; None while it has nothing to do.
        self._silent_since: float | None = None
        self._metrics.queue_depth.set_function(lambda: max(0, self.rows_unfinished - self._rows_running))
        self._metrics.rows_running.set_function(lambda: self._rows_running)

    @property
    def rows_unfinished(self) -> int:
        """Images admitted and not yet answered, waiting or being drawn."""
        return sum(entry.rows for entry in self._pending.values())

    async def start(self) -> None:
        """Starts the first worker and returns before it is ready. Raises OSError if there can be no process."""
        self._worker = self._start_worker()
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch_for_stalls())]

    async def stop(self) -> None:
        """Refuses new jobs, gives the unfinished ones `drain_timeout_s`, then ends the worker."""
        self._draining = True
        if answers := [entry.answer for entry in self._pending.values()]:
            await asyncio.wait(answers, timeout=self._settings.drain_timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(Draining("the server is stopping"), sent_only=False)
        # One that is not ready is loading weights and hears nothing.
        await self._worker.stop(EXIT_GRACE_S if self._ready.is_set() else 0)

    def status(self) -> EngineStatus:
        if self._draining:
            return replace(self._status, ready=False, reason="draining")
        if self._stalled:
            return replace(self._status, ready=False, reason=f"the worker has not answered for {self._settings.stall_timeout_s:g} s")
        return self._status

    async def run(self, job: Job) -> Finished:
        """Answers with the job's pictures; `timings.queue` counts from this call on. Cancelling the awaiting task cancels the job.

        job.id must be unique among the unfinished. Raises QueueFull, Draining, Starting, WorkerLost, DeadlineExceeded or JobFailed.
        """
        entry = self._admit(job)
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                await self._send(entry)
                answer = await entry.answer
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed") from None
        except asyncio.CancelledError:
            self._metrics.cancelled.labels("worker" if entry.sent_at else "queue").inc()
            raise
        finally:
            self._forget(entry)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def _admit(self, job: Job) -> _Pending:
        if self._draining:
            raise Draining("the server is stopping")
        unfinished = self.rows_unfinished
        # A request larger than the queue itself is still done, alone.
        if unfinished and unfinished + len(job.seeds) > self._settings.queue_rows:
            raise QueueFull(unfinished * self._pace.seconds_per_row)
        entry = _Pending(job, time.monotonic(), asyncio.get_running_loop().create_future())
        self._pending[job.id] = entry
        return entry

    async def _send(self, entry: _Pending) -> None:
        try:
            async with asyncio.timeout(self._settings.start_wait_s):
                await self._ready.wait()
        except TimeoutError:
            raise Starting(self._status.reason) from None
        entry.sent_at = time.monotonic()
        self._silent_since = self._silent_since or entry.sent_at
        self._worker.send(entry.job)

    def _forget(self, entry: _Pending) -> None:
        del self._pending[entry.job.id]
        if entry.owed:
            self._worker.send(Cancel(entry.job.id))
            # Nobody answers a Cancel, so a worker that was given nothing else owes nothing.
            if not self._owing:
                self._silent_since = None

    def _fail_all(self, error: EngineError, *, sent_only: bool) -> None:
        for entry in self._pending.values():
            if entry.sent_at or not sent_only:
                entry.resolve(error)

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _receive(self, message: FromWorker) -> None:
        match message:
            case Ready(device, dtype):
                self._status = EngineStatus(True, "ready", device, dtype)
                self._ready.set()
            case Finished():
                self._finish(message)
            case Failed(id, code, text, repeating):
                log.error("job failed", extra={"fields": {"job": id, "code": code, "reason": text, "repeating": repeating}})
                if entry := self._pending.get(id):
                    error = DeadlineExceeded(text) if code == "deadline" else JobFailed(code, text, repeating)
                    entry.resolve(error)
            case Beat():
                self._observe(message)
        self._silent_since = time.monotonic() if self._owing else None

    def _finish(self, message: Finished) -> None:
        self._failures = 0
        entry = self._pending.get(message.id)
        if entry is None or entry.sent_at is None:
            return
        timings = replace(message.timings, queue=message.timings.queue + entry.sent_at - entry.arrived_at)
        self._metrics.queue_duration.observe(timings.queue)
        self._metrics.encode_duration.observe(timings.encode)
        self._metrics.prior_duration.observe(timings.prior)
        self._metrics.decode_duration.observe(timings.decode)
        self._pace.record(entry)
        entry.resolve(replace(message, timings=timings))

    def _observe(self, beat: Beat) -> None:
        self._rows_running = beat.rows_running
        for rows, seconds in beat.steps:
            self._metrics.step_rows.observe(rows)
            self._metrics.step_duration.observe(seconds)

    # ── supervision ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _owing(self) -> bool:
        return any(entry.owed for entry in self._pending.values())

    @property
    def _stalled(self) -> bool:
        return self._silent_since is not None and time.monotonic() - self._silent_since > self._settings.stall_timeout_s

    def _start_worker(self) -> WorkerProcess:
        worker = WorkerProcess(self._worker_main, self._settings, self._receive)
        worker.start()
        return worker

    async def _supervise(self) -> None:
        while True:
            code = await asyncio.shield(self._worker.exited)
            self._lose_worker(f"the worker exited with code {code}")
            while True:
                self._failures += 1
                await asyncio.sleep(min(LAST_RESTART_DELAY_S, FIRST_RESTART_DELAY_S * 2**self._failures))
                try:
                    self._worker = self._start_worker()
                    break
                except OSError:
                    log.exception("a worker could not be started")
            self._metrics.worker_restarts.inc()

    def _lose_worker(self, reason: str) -> None:
        log.error("worker lost", extra={"fields": {"reason": reason}})
        self._ready.clear()
        self._status = EngineStatus(ready=False, reason=f"{reason}; another is starting")
        self._rows_running = 0
        self._silent_since = None
        self._fail_all(WorkerLost(reason), sent_only=True)

    async def _watch_for_stalls(self) -> None:
        while True:
            await asyncio.sleep(self._settings.stall_timeout_s / 4)
            if self._stalled:
                log.error("worker stalled", extra={"fields": {"silent_s": self._settings.stall_timeout_s}})
                self._worker.kill()
