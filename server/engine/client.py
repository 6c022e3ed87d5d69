"""Admit jobs, dispatch them to the workers, and replay those that a lost worker had."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from server.engine.errors import DeadlineExceeded, DeadlineUnreachable, Draining, EngineError, JobFailed, QueueFull, Starting, WorkerLost
from server.engine.latency_model import Costs, Forecast, Pace
from server.engine.messages import Beat, Drawn, Failed, Finished, Job, Preview, Running
from server.engine.supervisor import Supervisor, WorkerMain, WorkerStatus, run_worker
from server.metrics import Metrics
from server.settings import Settings

OnPreview = Callable[[Preview], object]
OnDrawn = Callable[[Drawn], object]
OnStarted = Callable[[], object]


@dataclass(slots=True)
class Pending:
    """worker, sent_at: who was given it when, None while it waits. patience: ends a wait for a worker."""

    job: Job
    arrived_at: float
    forecast: Forecast
    answer: asyncio.Future[Finished | EngineError]
    on_started: OnStarted | None = None
    on_preview: OnPreview | None = None
    on_drawn: OnDrawn | None = None
    worker: Supervisor | None = None
    sent_at: float | None = None
    patience: asyncio.TimerHandle | None = None
    lone_deaths: int = 0
    # The number of each image's latest preview: a worker that begins again begins with the first.
    _previewed: dict[int, int] = field(default_factory=dict)
    _handed_out: set[int] = field(default_factory=set)

    @property
    def rows(self) -> int:
        return len(self.job.seeds)

    def resolve(self, answer: Finished | EngineError) -> None:
        # Whoever awaited it may be cancelled in the same turn of the loop.
        if not self.answer.done():
            self.answer.set_result(answer)

    def finish(self, message: Finished, sent_at: float) -> Finished:
        """Resolves to the answer, its queue time counted from the arrival here; returns it."""
        timings = replace(message.timings, queue=message.timings.queue + sent_at - self.arrived_at)
        answer = replace(message, timings=timings)
        self.resolve(answer)
        return answer

    def start(self) -> None:
        """Says once that the first of its rows is begun."""
        if self.on_started and not self.answer.done():
            self.on_started()
        self.on_started = None

    def show(self, preview: Preview) -> None:
        """Hands on a preview unless this one, or a later one of the image, was handed on before."""
        if self.on_preview and not self.answer.done() and preview.number > self._previewed.get(preview.image.index, -1):
            self._previewed[preview.image.index] = preview.number
            self.on_preview(preview)

    def hand_out(self, drawn: Drawn) -> None:
        """Hands on an image unless it was handed on before: a worker that begins again sends all of them."""
        if self.on_drawn and not self.answer.done() and drawn.image.index not in self._handed_out:
            self._handed_out.add(drawn.image.index)
            self.on_drawn(drawn)

    def be_sent(self, worker: Supervisor) -> None:
        self.be_patient(None)
        self.worker, self.sent_at = worker, time.monotonic()
        worker.send(self.job)

    def be_patient(self, patience: asyncio.TimerHandle | None) -> None:
        if self.patience:
            self.patience.cancel()
        self.patience = patience


log = logging.getLogger(__name__)

# A job that was alone in the stage in which so many workers died is not given to another.
LONE_DEATHS = 2
TRY_AGAIN_S = 10.0


class EngineClient:
    """Runs jobs in worker processes, one a device, which are replaced whenever they die or stall. To be used from one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None, worker: WorkerMain = run_worker) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        devices = [settings.model_copy(update={"device": device, "devices": None}) for device in settings.worker_devices]
        self._workers = [Supervisor(worker, own, self._metrics, self) for own in devices]
        self._pending: dict[str, Pending] = {}
        self._pace = Pace()
        self._costs = Costs()
        self._draining = False
        self._metrics.queue_depth.set_function(lambda: max(0, self.rows_unfinished - self.rows_running))
        self._metrics.rows_running.set_function(lambda: self.rows_running)
        self._metrics.watch(lambda: [worker.state for worker in self._workers])
        self._metrics.prompt_cache_bytes.set_function(lambda: sum(worker.last_beat.cache_bytes for worker in self._workers))

    @property
    def rows_unfinished(self) -> int:
        """Images admitted and not yet answered, waiting or being drawn."""
        return sum(entry.rows for entry in self._pending.values())

    @property
    def rows_running(self) -> int:
        """Images being drawn, as the workers said last."""
        return sum(worker.last_beat.rows_running for worker in self._workers)

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

    async def run(
        self,
        job: Job,
        on_preview: OnPreview | None = None,
        on_drawn: OnDrawn | None = None,
        on_admitted: Callable[[Forecast], object] = lambda _: None,
        on_started: OnStarted | None = None,
    ) -> Finished:
        """Answers with the job's pictures; `timings.queue` counts from this call on. Cancelling the awaiting task cancels the job.

        job.id must be unique among the unfinished. on_preview: called on the event loop with those of `job.previews` that are made in time,
        each image's in order and none twice. on_drawn: called there with each image of a job that is `early`, in any order and none twice.
        on_admitted: called before this waits for the first time, unless the job is refused. on_started: called there, once, when a worker
        begins with it.
        Raises QueueFull, DeadlineUnreachable, Draining, Starting, WorkerLost, DeadlineExceeded or JobFailed.
        """
        entry = self._admit(job)
        entry.on_preview, entry.on_drawn, entry.on_started = on_preview, on_drawn, on_started
        try:
            on_admitted(entry.forecast)
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

    def _admit(self, job: Job) -> Pending:
        now = time.monotonic()
        if self._draining:
            raise Draining("the server is stopping")
        if job.deadline <= now:
            raise DeadlineExceeded("the deadline passed")
        unfinished = self.rows_unfinished
        # A request larger than the queue itself is still done, alone.
        if unfinished and unfinished + len(job.seeds) > self._settings.queue_rows:
            raise QueueFull(unfinished * self._pace.seconds_per_row)
        entry = Pending(job, now, self._foresee(job, now), asyncio.get_running_loop().create_future())
        self._pending[job.id] = entry
        return entry

    def _foresee(self, job: Job, now: float) -> Forecast:
        """Raises DeadlineUnreachable if, as far as is known, the job's answer would come too late."""
        # Batch work makes room for interactive work, so it is not in its way.
        others = [entry.job for entry in self._pending.values() if (entry.job.priority, job.priority) != ("batch", "interactive")]
        slots = self._settings.max_batch_rows * len(self._workers)
        left = {id: steps for worker in self._workers for id, steps in worker.last_beat.left.items()}
        finish, allowed = self._costs.predict(job, others, slots, now, left), job.deadline - now
        if finish is not None and finish > allowed and not self._may_try(now):
            alone = self._costs.predict(job, [], slots, now)
            raise DeadlineUnreachable(finish, allowed, repeating=alone is None or alone <= allowed)
        before = sum(len(other.seeds) for other in others)
        # The pace never forgets: it is no ground to refuse anybody, but better than no figure at all.
        seconds = (before + len(job.seeds)) * self._pace.seconds_per_row if finish is None else finish
        return Forecast(max(0, before + 1 - slots), seconds)

    def _may_try(self, now: float) -> bool:
        """Whether an idle server does better to try: after a slow spell it would refuse everybody until that is forgotten."""
        return not self._pending and now - self._costs.measured_at > TRY_AGAIN_S

    def _dispatch(self, entry: Pending) -> None:
        """Gives the job to the worker with the fewest rows, or lets it wait for one."""
        if workers := [worker for worker in self._workers if worker.accepting]:
            entry.be_sent(min(workers, key=lambda worker: worker.rows_owed))
        else:
            error = WorkerLost if entry.sent_at else Starting
            loop = asyncio.get_running_loop()
            entry.be_patient(loop.call_later(self._settings.start_wait_s, lambda: entry.resolve(error(self.status().reason))))

    def _forget(self, entry: Pending) -> None:
        del self._pending[entry.job.id]
        entry.be_patient(None)
        if entry.worker:
            entry.worker.cancel(entry.job.id)

    # ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def worker_ready(self, worker: Supervisor) -> None:
        for entry in self._pending.values():
            if entry.worker is None and not entry.answer.done():
                entry.be_sent(worker)

    def worker_said(self, worker: Supervisor, message: Running | Preview | Drawn | Finished | Failed | Beat) -> None:
        match message:
            case Running(jobs):
                for begun in filter(None, map(self._pending.get, jobs)):
                    begun.start()
            case Beat():
                self._metrics.record_beat(message, self._settings.max_batch_rows)
                for step in message.steps:
                    self._costs.record_step(step, time.monotonic())
            case Failed(id, code, text, repeating):
                log.error("job failed", extra={"fields": {"job": id, "code": code, "reason": text, "repeating": repeating}})
                if entry := self._pending.get(id):
                    entry.resolve(DeadlineExceeded(text) if code == "deadline" else JobFailed(code, text, repeating))
            case Preview(id):
                if entry := self._pending.get(id):
                    entry.show(message)
            case Drawn(id):
                if entry := self._pending.get(id):
                    entry.hand_out(message)
            case Finished(id):
                if (entry := self._pending.get(id)) and entry.sent_at is not None:
                    self._pace.record(entry.rows, entry.sent_at)
                    timings = entry.finish(message, entry.sent_at).timings
                    self._metrics.record_timings(timings)
                    self._costs.record_job(entry.rows, timings, time.monotonic())

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
