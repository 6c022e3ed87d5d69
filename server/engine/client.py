"""The API process's side of the engine: admits jobs, hands them to the workers, and repeats those that a worker took with it."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace

from server.engine.costs import Costs
from server.engine.errors import DeadlineExceeded, DeadlineUnreachable, Draining, EngineError, JobFailed, QueueFull, Starting, WorkerLost
from server.engine.process import WorkerMain, run_worker
from server.engine.protocol import Beat, Failed, Finished, Job
from server.engine.supervisor import Supervisor, WorkerStatus
from server.metrics import Metrics
from server.settings import Settings

log = logging.getLogger(__name__)

# A job that was alone in the stage in which so many workers died is not given to another.
LONE_DEATHS = 2


@dataclass(slots=True)
class _Pending:
    """An unfinished job. worker, sent_at: who was given it when, None while it waits. patience: ends a wait for a worker."""

    job: Job
    arrived_at: float
    answer: asyncio.Future[Finished | EngineError]
    worker: Supervisor | None = None
    sent_at: float | None = None
    patience: asyncio.TimerHandle | None = None
    lone_deaths: int = 0

    @property
    def rows(self) -> int:
        return len(self.job.seeds)

    def resolve(self, answer: Finished | EngineError) -> None:
        # Whoever awaited it may be cancelled in the same turn of the loop.
        if not self.answer.done():
            self.answer.set_result(answer)

    def be_sent(self, worker: Supervisor) -> None:
        self.be_patient(None)
        self.worker, self.sent_at = worker, time.monotonic()
        worker.send(self.job)

    def be_patient(self, patience: asyncio.TimerHandle | None) -> None:
        if self.patience:
            self.patience.cancel()
        self.patience = patience


@dataclass(slots=True)
class _Pace:
    """Seconds the workers take per row, averaged over about the last ten jobs; a fifth of a second before anything is measured."""

    seconds: float = 0.2
    rows: float = 1.0
    last_finish: float = field(default_factory=time.monotonic)

    def record(self, rows: int, sent_at: float) -> None:
        now = time.monotonic()
        self.seconds = 0.9 * self.seconds + now - max(self.last_finish, sent_at)
        self.rows = 0.9 * self.rows + rows
        self.last_finish = now

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows


class EngineClient:
    """Runs jobs in worker processes, one a device, which are replaced whenever they die or stall. To be used from one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None, worker: WorkerMain = run_worker) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        devices = [settings.model_copy(update={"device": device, "devices": None}) for device in settings.worker_devices]
        self._workers = [Supervisor(worker, own, self._metrics, self) for own in devices]
        self._pending: dict[str, _Pending] = {}
        self._pace = _Pace()
        self._costs = Costs()
        self._draining = False
        self._metrics.queue_depth.set_function(lambda: max(0, self.rows_unfinished - self.rows_running))
        self._metrics.rows_running.set_function(lambda: self.rows_running)

    @property
    def rows_unfinished(self) -> int:
        """Images admitted and not yet answered, waiting or being drawn."""
        return sum(entry.rows for entry in self._pending.values())

    @property
    def rows_running(self) -> int:
        """Images being drawn, as the workers said last."""
        return sum(worker.rows_running for worker in self._workers)

    async def start(self) -> None:
        """Starts the workers and returns before they are ready. Raises OSError if there can be no process."""
        for worker in self._workers:
            await worker.start()

    async def stop(self) -> None:
        """Refuses new jobs, gives the unfinished ones `drain_timeout_s`, then ends the workers."""
        self._draining = True
        if answers := [entry.answer for entry in self._pending.values()]:
            await asyncio.wait(answers, timeout=self._settings.drain_timeout_s)
        for entry in self._pending.values():
            entry.resolve(Draining("the server is stopping"))
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def status(self) -> WorkerStatus:
        """Ready when every worker is; otherwise the reason of the first that is not, and how many requests wait for it."""
        statuses = [worker.status for worker in self._workers]
        status = next((status for status in statuses if not status.ready), statuses[0])
        if self._draining:
            return replace(status, ready=False, reason="draining")
        waiting = sum(entry.worker is None for entry in self._pending.values())
        if waiting:
            return replace(status, reason=f"{status.reason}; requests waiting: {waiting}")
        return status

    async def run(self, job: Job) -> Finished:
        """Answers with the job's pictures; `timings.queue` counts from this call on. Cancelling the awaiting task cancels the job.

        job.id must be unique among the unfinished. Raises QueueFull, DeadlineUnreachable, Draining, Starting, WorkerLost, DeadlineExceeded
        or JobFailed.
        """
        entry = self._admit(job)
        try:
            self._dispatch(entry)
            async with asyncio.timeout(job.deadline - time.monotonic()):
                answer = await entry.answer
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed") from None
        except asyncio.CancelledError:
            self._metrics.cancelled.labels("worker" if entry.worker else "queue").inc()
            raise
        finally:
            self._forget(entry)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    # ── in ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, job: Job) -> _Pending:
        now = time.monotonic()
        if self._draining:
            raise Draining("the server is stopping")
        if job.deadline <= now:
            raise DeadlineExceeded("the deadline passed")
        unfinished = self.rows_unfinished
        # A request larger than the queue itself is still done, alone.
        if unfinished and unfinished + len(job.seeds) > self._settings.queue_rows:
            raise QueueFull(unfinished * self._pace.seconds_per_row)
        self._check_deadline(job, now)
        entry = _Pending(job, now, asyncio.get_running_loop().create_future())
        self._pending[job.id] = entry
        return entry

    def _check_deadline(self, job: Job, now: float) -> None:
        """Raises DeadlineUnreachable if, as far as is known, the job's answer would come too late."""
        # Batch work makes room for interactive work, so it is not in its way.
        others = [entry.job for entry in self._pending.values() if (entry.job.priority, job.priority) != ("batch", "interactive")]
        slots = self._settings.max_batch_rows * len(self._workers)
        finish, allowed = self._costs.predict(job, others, slots, now), job.deadline - now
        if finish is not None and finish > allowed:
            alone = self._costs.predict(job, [], slots, now)
            raise DeadlineUnreachable(finish, allowed, repeating=alone is None or alone <= allowed)

    def _dispatch(self, entry: _Pending) -> None:
        """Gives the job to the worker with the fewest rows, or lets it wait for one."""
        if workers := [worker for worker in self._workers if worker.accepting]:
            entry.be_sent(min(workers, key=lambda worker: worker.rows_owed))
        else:
            error = WorkerLost if entry.sent_at else Starting
            loop = asyncio.get_running_loop()
            entry.be_patient(loop.call_later(self._settings.start_wait_s, lambda: entry.resolve(error(self.status().reason))))

    def _forget(self, entry: _Pending) -> None:
        del self._pending[entry.job.id]
        entry.be_patient(None)
        if entry.worker:
            entry.worker.cancel(entry.job.id)

    # ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def worker_ready(self, worker: Supervisor) -> None:
        for entry in self._pending.values():
            if entry.worker is None and not entry.answer.done():
                entry.be_sent(worker)

    def worker_said(self, worker: Supervisor, message: Finished | Failed | Beat) -> None:
        match message:
            case Finished():
                self._finish(message)
            case Failed(id, code, text, repeating):
                log.error("job failed", extra={"fields": {"job": id, "code": code, "reason": text, "repeating": repeating}})
                if entry := self._pending.get(id):
                    entry.resolve(DeadlineExceeded(text) if code == "deadline" else JobFailed(code, text, repeating))
            case Beat(steps):
                for step in steps:
                    self._metrics.step_rows.observe(step.rows)
                    self._metrics.step_duration.observe(step.seconds)
                    self._costs.record_step(step, time.monotonic())

    def _finish(self, message: Finished) -> None:
        entry = self._pending.get(message.id)
        if entry is None or entry.sent_at is None:
            return
        timings = replace(message.timings, queue=message.timings.queue + entry.sent_at - entry.arrived_at)
        self._metrics.queue_duration.observe(timings.queue)
        self._metrics.encode_duration.observe(timings.encode)
        self._metrics.prior_duration.observe(timings.prior)
        self._metrics.decode_duration.observe(timings.decode)
        self._pace.record(entry.rows, entry.sent_at)
        self._costs.record_job(entry.rows, timings, time.monotonic())
        entry.resolve(replace(message, timings=timings))

    def worker_lost(self, worker: Supervisor, reason: str, unfinished: frozenset[str], suspects: frozenset[str]) -> None:
        """Repeats what the worker had, which is harmless because it is seeded; a suspect from now on alone, or not at all."""
        for id in unfinished:
            if (entry := self._pending.get(id)) is None or entry.answer.done():
                continue
            entry.worker = None
            if id in suspects:
                entry.job = replace(entry.job, alone=True)
                entry.lone_deaths += len(suspects) == 1
            if entry.lone_deaths >= LONE_DEATHS:
                log.error("a job is given up", extra={"fields": {"job": id, "workers_lost": entry.lone_deaths}})
                entry.resolve(JobFailed("poison", reason, repeating=False))
            else:
                self._metrics.requests_replayed.inc()
                self._dispatch(entry)
