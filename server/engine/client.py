"""Admit jobs, dispatch them to the workers, and replay those that a lost worker had.

Runs in the API process, on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from server.engine.cpu_share import CPUShare
from server.engine.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    Draining,
    EngineError,
    JobFailed,
    QueueFull,
    Starting,
    WorkerLost,
)
from server.engine.hooks import NO_HOOKS, HookName, Hooks, ReplayFilter
from server.engine.job import Job
from server.engine.latency_model import Forecast, LatencyModel
from server.engine.messages import Drawn, Failed, Finished, Heartbeat, Preview, Running
from server.engine.retry_slots import RetrySlots
from server.engine.supervisor import Supervisor, WorkerMessage, WorkerStatus
from server.engine.worker_process import WorkerMain, run_worker
from server.metrics import Metrics
from server.pace import Pace
from server.settings import Settings

log = logging.getLogger(__name__)

# A job that was alone in the stage in which this many workers crashed is not replayed again.
MAX_SOLO_CRASHES = 2
# An idle server admits a job whose forecast is too late once its measurements are this old,
# seconds.
RETRY_FORECAST_S = 10.0


@dataclass(slots=True)
class PendingJob:
    """One unfinished job: the worker that has it, and the calls of the caller's hooks.

    image_bytes: of the job. worker, sent_at: None while the job waits for a worker. timeout: ends
    that wait. started: whether the worker has begun it. solo_crashes: workers that crashed in a
    stage with this job alone.
    """

    job: Job
    arrived_at: float
    forecast: Forecast
    answer: asyncio.Future[Finished | EngineError]
    image_bytes: int
    calls: ReplayFilter
    worker: Supervisor | None = None
    sent_at: float | None = None
    timeout: asyncio.TimerHandle | None = None
    started: bool = False
    solo_crashes: int = 0

    @property
    def rows(self) -> int:
        """Rows of the job."""
        return self.job.rows

    def resolve(self, answer: Finished | EngineError) -> None:
        """Set the answer, unless there is one already."""
        # The caller may be cancelled in the same turn of the loop.
        if not self.answer.done():
            self.answer.set_result(answer)

    def finish(self, message: Finished, sent_at: float) -> Finished:
        """Resolve to the answer, its queue time counted from the arrival here; return it."""
        timings = replace(message.timings, queue=message.timings.queue + sent_at - self.arrived_at)
        answer = replace(message, timings=timings)
        self.resolve(answer)
        return answer

    def call(self, hook: HookName, *args: Any) -> None:
        """Call one of the hooks, unless the job is answered or a replay repeats the call."""
        if not self.answer.done():
            self.calls.call(hook, *args)

    def send_to(self, worker: Supervisor) -> None:
        """Send the job to a worker."""
        self.set_timeout(None)
        self.worker, self.sent_at = worker, time.monotonic()
        worker.send(self.job)

    def set_timeout(self, timeout: asyncio.TimerHandle | None) -> None:
        """Replace the timer that ends the wait for a worker."""
        if self.timeout:
            self.timeout.cancel()
        self.timeout = timeout


class EngineClient:
    """Run jobs in worker processes, one per device, and replace each that crashes or stalls.

    workers: one supervisor per device.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics | None = None, worker: WorkerMain = run_worker
    ) -> None:
        self._settings = settings
        self.metrics = metrics or Metrics()
        per_device = [
            settings.model_copy(update={"device": name, "devices": None})
            for name in settings.worker_devices
        ]
        self.workers = [
            Supervisor(worker, device_settings, self.metrics, self, index)
            for index, device_settings in enumerate(per_device)
        ]
        self._cpu = CPUShare(self.workers)
        self._pending: dict[str, PendingJob] = {}
        self._pace = Pace()  # of rows
        self._latency = LatencyModel()
        self._retry_slots = RetrySlots()
        self._draining = False
        self.metrics.queue_depth.set_function(
            lambda: max(0, self.rows_unfinished - self.rows_running)
        )
        self.metrics.rows_running.set_function(lambda: self.rows_running)
        self.metrics.watch(lambda: [worker.state for worker in self.workers])
        self.metrics.prompt_cache_bytes.set_function(
            lambda: sum(worker.last_heartbeat.cache_bytes for worker in self.workers)
        )

    @property
    def rows_unfinished(self) -> int:
        """Rows admitted and not yet answered, waiting or being drawn: images and tiles."""
        return sum(entry.rows for entry in self._pending.values())

    @property
    def rows_running(self) -> int:
        """Rows being drawn, by the workers' last heartbeats."""
        return sum(worker.last_heartbeat.rows_running for worker in self.workers)

    async def start(self) -> None:
        """Start the workers and return before they are ready.

        Raises OSError if the system does not grant every process; none is left then.
        """
        try:
            for worker in self.workers:
                await worker.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Refuse new jobs, give the unfinished ones `drain_timeout_s`, then stop the workers."""
        self._draining = True
        if answers := [entry.answer for entry in self._pending.values()]:
            hopeless = self.status().fatal and not any(w.accepting for w in self.workers)
            await asyncio.wait(answers, timeout=0 if hopeless else self._settings.drain_timeout_s)
        for entry in self._pending.values():
            entry.resolve(Draining("the server is stopping"))
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    def status(self) -> WorkerStatus:
        """Return ready while any worker is; otherwise the reason of the first.

        A worker that can never start comes first. The reason names the number of requests that wait
        for a worker.
        """
        statuses = [worker.status for worker in self.workers]
        status = max(statuses, key=lambda status: (status.fatal is not None, status.ready))
        if self._draining:
            return replace(status, ready=False, reason="draining")
        waiting = sum(entry.worker is None for entry in self._pending.values())
        if waiting:
            return replace(status, reason=f"{status.reason}; requests waiting: {waiting}")
        return status

    def check_room(self, rows: int) -> None:
        """Reject a job with images before they are decoded, if `run` would reject it now.

        rows: of the job. Raises QueueFull or Draining.
        """
        # The size is unknown yet, but any image takes a byte.
        self._check_room(rows, 1, time.monotonic())

    async def run(self, job: Job, hooks: Hooks = NO_HOOKS) -> Finished:
        """Return the job's images; `timings.queue` counts from this call on.

        Cancelling the awaiting task cancels the job. job.id must be unique among the unfinished.

        Raises QueueFull, DeadlineUnreachable, Draining, Starting, WorkerLost, DeadlineExceeded or
        JobFailed.
        """
        entry = self._admit(job, hooks)
        try:
            entry.call("on_admitted", entry.forecast)
            self._dispatch(entry)
            async with asyncio.timeout(job.deadline - time.monotonic()):
                answer = await entry.answer
        except TimeoutError:
            late = DeadlineExceeded("the deadline passed")
            raise (late if entry.worker else self._no_worker(entry)) from None
        except asyncio.CancelledError:
            self.metrics.cancelled.labels("worker" if entry.started else "queue").inc()
            raise
        finally:
            self._forget(entry)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    # ── admission and dispatch ────────────────────────────────────────────────────────────────────

    def _admit(self, job: Job, hooks: Hooks) -> PendingJob:
        now = time.monotonic()
        if job.deadline <= now:
            raise DeadlineExceeded("the deadline passed")
        self._check_room(job.rows, job.image_bytes, now)
        answer: asyncio.Future[Finished | EngineError] = asyncio.get_running_loop().create_future()
        forecast, calls = self._forecast(job, now), ReplayFilter(hooks)
        entry = PendingJob(job, now, forecast, answer, job.image_bytes, calls)
        self._pending[job.id] = entry
        return entry

    def _check_room(self, rows: int, image_bytes: int, now: float) -> None:
        if self._draining:
            raise Draining("the server is stopping")
        # A request larger than the queue itself is still done, alone.
        wait_s = self._time_to_room(rows, image_bytes) if self._pending else None
        if wait_s is not None:
            raise QueueFull(self._retry_after(wait_s, rows, now))

    def _forecast(self, job: Job, now: float) -> Forecast:
        """Predict the job's finish. Raises DeadlineUnreachable if it is after the deadline."""
        # Batch work makes room for interactive work, so it does not delay it.
        others = [
            entry.job
            for entry in self._pending.values()
            if (entry.job.priority, job.priority) != ("batch", "interactive")
        ]
        # Without any, they are all about to start.
        workers = sum(worker.accepting for worker in self.workers) or len(self.workers)
        slots = self._settings.max_batch_rows * workers
        left = {
            id: steps for worker in self.workers for id, steps in worker.last_heartbeat.left.items()
        }
        allowed = job.deadline - now
        least = self._latency.predict(job, others, slots, now, left, least=True)
        if least is not None and least > allowed and not self._may_try(now):
            alone = self._latency.predict(job, [], slots, now, least=True)
            retryable = alone is None or alone <= allowed
            retry_after = self._retry_after(least - allowed, job.rows, now) if retryable else None
            raise DeadlineUnreachable(least, allowed, retryable, retry_after)
        finish = self._latency.predict(job, others, slots, now, left)
        before = sum(other.rows for other in others)
        # The pace may be old: it is no reason to reject a job, but better than no figure at all.
        seconds = (before + job.rows) * self._pace.seconds_per_unit if finish is None else finish
        return Forecast(max(0, before + 1 - slots), seconds)

    def _time_to_room(self, rows: int, image_bytes: int) -> float | None:
        """Return the seconds until a job of this size should fit into the queue.

        By the present pace; the oldest jobs are expected to be done first. None: it fits now.
        """
        excess_rows = self.rows_unfinished + rows - self._settings.queue_rows
        held = sum(entry.image_bytes for entry in self._pending.values())
        excess_bytes = held + image_bytes - self._settings.queue_bytes
        if excess_rows <= 0 and excess_bytes <= 0:
            return None
        finishing = 0
        for entry in self._pending.values():
            if excess_rows <= 0 and excess_bytes <= 0:
                break
            finishing += entry.rows
            excess_rows -= entry.rows
            excess_bytes -= entry.image_bytes
        return finishing * self._pace.seconds_per_unit

    def _retry_after(self, earliest_s: float, rows: int, now: float) -> float:
        """Return the seconds after which the client of a rejected job of `rows` should retry."""
        spacing_s = rows * self._pace.seconds_per_unit
        return self._retry_slots.take(earliest_s, spacing_s, now)

    def _may_try(self, now: float) -> bool:
        """Return whether the server is idle and its measurements are old.

        After a slow spell it would otherwise reject every job until the measurements expire.
        """
        return not self._pending and now - self._latency.measured_at > RETRY_FORECAST_S

    def _dispatch(self, entry: PendingJob) -> None:
        """Send the job to the worker with the fewest rows, or let it wait for one.

        A silent worker is the last choice.
        """
        if workers := [worker for worker in self.workers if worker.accepting]:
            entry.send_to(min(workers, key=lambda w: (not w.status.ready, w.rows_owed)))
            return
        loop = asyncio.get_running_loop()
        wait_s = self._settings.start_wait_s
        entry.set_timeout(loop.call_later(wait_s, lambda: entry.resolve(self._no_worker(entry))))

    def _no_worker(self, entry: PendingJob) -> EngineError:
        """Return the error of a job that waited for a worker in vain."""
        error = WorkerLost if entry.sent_at else Starting
        return error(self.status().reason)

    def _forget(self, entry: PendingJob) -> None:
        del self._pending[entry.job.id]
        entry.set_timeout(None)
        if entry.worker:
            entry.worker.cancel(entry.job.id)

    # ── events of the workers ─────────────────────────────────────────────────────────────────────

    def on_worker_ready(self, worker: Supervisor) -> None:
        """Send the worker every job that waits."""
        for entry in self._pending.values():
            if entry.worker is None and not entry.answer.done():
                entry.send_to(worker)

    def on_rows_owed(self, worker: Supervisor) -> None:
        """Divide the CPU anew."""
        self._cpu.update()

    def on_worker_message(self, worker: Supervisor, message: WorkerMessage) -> None:
        """Pass a message on to its job, and its figures to the metrics."""
        match message:
            case Running(jobs):
                for each in filter(None, map(self._pending.get, jobs)):
                    each.started = True
                    each.call("on_started")
            case Heartbeat():
                self._cpu.update()
                self._record_heartbeat(message)
            case Failed():
                self._fail(message)
            case Finished():
                self._finish(message)
            case Preview(id) if entry := self._pending.get(id):
                entry.call("on_preview", message)
            case Drawn(id) if entry := self._pending.get(id):
                entry.call("on_drawn", message)

    def _fail(self, message: Failed) -> None:
        error: EngineError
        if message.code == "deadline":
            # Whether the worker or `run` notices it first is chance: neither is the server's fault.
            error = DeadlineExceeded(message.message)
        else:
            error = JobFailed(message.code, message.message, message.retryable)
            fields = {
                "job": message.id,
                "code": message.code,
                "reason": message.message,
                "retryable": message.retryable,
            }
            log.error("job failed", extra={"fields": fields})
        if entry := self._pending.get(message.id):
            entry.resolve(error)

    def _finish(self, message: Finished) -> None:
        if (entry := self._pending.get(message.id)) and entry.sent_at is not None:
            self._pace.record(entry.rows, entry.sent_at)
            timings = entry.finish(message, entry.sent_at).timings
            self.metrics.record_timings(timings)
            self._latency.record_job(entry.job, timings, time.monotonic())

    def _record_heartbeat(self, heartbeat: Heartbeat) -> None:
        self.metrics.record_heartbeat(heartbeat, self._settings.max_batch_rows)
        for step in heartbeat.steps:
            self._latency.record_step(step, time.monotonic())

    def on_worker_lost(
        self, worker: Supervisor, reason: str, unfinished: frozenset[str], suspects: frozenset[str]
    ) -> None:
        """Replay the worker's jobs, which are seeded; suspects run alone from now on, or fail."""
        for id in unfinished:
            if (entry := self._pending.get(id)) is None or entry.answer.done():
                continue
            entry.worker, entry.started = None, False
            if id in suspects:
                entry.job = replace(entry.job, alone=True)
                entry.solo_crashes += len(suspects) == 1
            if entry.solo_crashes >= MAX_SOLO_CRASHES:
                log.error(
                    "job abandoned",
                    extra={"fields": {"job": id, "workers_lost": entry.solo_crashes}},
                )
                entry.resolve(JobFailed("poison", reason, retryable=False))
            else:
                self.metrics.requests_replayed.inc()
                self._dispatch(entry)
