"""The engine as the HTTP API knows it, at the other end of a Ray handle: jobs go to one of many replicas, and to another if it is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from prometheus_client import Metric
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from server.engine.client import EngineClient
from server.engine.errors import DeadlineExceeded, Draining, EngineError, Starting, WorkerLost
from server.engine.process import WorkerMain, run_worker
from server.engine.protocol import Finished, Job
from server.engine.supervisor import WorkerStatus
from server.metrics import Metrics
from server.ray_serve.deduplication import Call, Telling
from server.ray_serve.merged_metrics import Fleet
from server.ray_serve.routing import Load, Meter
from server.settings import Settings

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
REPORT_TIMEOUT_S = 5.0
# A job whose replica went away under it so often is not given to another: it may be what makes them go.
LIVES = 4
# By which a replica says that it cannot, although another might.
ELSEWHERE = (Draining, Starting, WorkerLost)


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says every second. status: None for one that has no engine."""

    replica: str
    status: WorkerStatus | None
    figures: list[Metric]


class LocalEngine:
    """A replica's side: one `EngineClient` with its workers."""

    def __init__(self, settings: Settings, worker: WorkerMain = run_worker) -> None:
        self._metrics = Metrics()
        self._engine = EngineClient(settings, self._metrics, worker)
        self._meter = Meter()
        self._settings = settings
        self._not_ready_since: float | None = None

    async def start(self, timeout_s: float) -> None:
        """Returns when the workers are ready. Raises RuntimeError if they are not in time."""
        await self._engine.start()
        deadline = time.monotonic() + timeout_s
        while not (status := self._engine.status()).ready:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no worker was ready within {timeout_s:g} s: {status.reason}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        await self._engine.stop()

    async def run(self, sender: str, job: Job, patience_s: float, hooks: tuple[str, ...]) -> AsyncIterator[Call | Finished | EngineError]:
        """What `EngineClient.run` calls of these hooks, as it happens, then how it ended.

        patience_s: until the job's deadline, since machines have clocks of their own.
        """
        calls: asyncio.Queue[Call | None] = asyncio.Queue()
        job = replace(job, deadline=time.monotonic() + patience_s)
        work = asyncio.create_task(self._engine.run(job, **{name: partial(_put, calls, name) for name in hooks}))
        work.add_done_callback(lambda _: calls.put_nowait(None))
        end = self._meter.begin(sender, job)
        done = False
        try:
            while (call := await calls.get()) is not None:
                yield call
            outcome = work.exception() or work.result()
            done = isinstance(outcome, Finished)
            if not isinstance(outcome, Finished | EngineError):
                raise outcome
            yield outcome
        finally:
            end(done)
            work.cancel()

    def load(self) -> Load:
        return self._meter.load(self._engine.status().ready)

    @property
    def rows(self) -> int:
        return self._engine.rows_unfinished

    def check(self) -> None:
        """Raises RuntimeError once no worker has been ready for longer than requests would wait for one."""
        status = self._engine.status()
        if status.ready:
            self._not_ready_since = None
            return
        self._not_ready_since = self._not_ready_since or time.monotonic()
        if time.monotonic() - self._not_ready_since > self._settings.start_wait_s:
            raise RuntimeError(status.reason)

    def report(self, replica: str) -> Report:
        return Report(replica, self._engine.status(), list(self._metrics.registry.collect()))


def _put(calls: asyncio.Queue[Call | None], name: str, *args: Any) -> None:
    calls.put_nowait((name, args))


class RemoteEngine:
    """The API's side: what `EngineClient` is to the endpoints, over all replicas.

    engines, peers: Ray handles of the deployment whose replicas are `LocalEngine`s, and of the API's own.
    """

    def __init__(self, settings: Settings, metrics: Metrics, engines: Any, peers: Any) -> None:
        self._settings, self._metrics = settings, metrics
        self._engines, self._peers = engines, peers
        self._sender = ray.get_runtime_context().get_actor_id()
        self._reports: list[Report] = []
        self._draining = False
        self.own_figures = metrics.registry
        self._fleet = metrics.registry = Fleet()

    async def start(self) -> None:
        self._reporting = asyncio.create_task(self._report_for_ever())

    async def stop(self) -> None:
        """Refuses new jobs; Ray has waited for the unfinished ones."""
        self._draining = True
        self._reporting.cancel()
        await asyncio.gather(self._reporting, return_exceptions=True)

    def status(self) -> WorkerStatus:
        """Ready while any replica is."""
        statuses = [report.status for report in self._reports if report.status]
        if self._draining:
            return WorkerStatus(ready=False, reason="draining")
        ready = (status for status in statuses if status.ready)
        return next(ready, next(iter(statuses), WorkerStatus(ready=False, reason="no replica has an engine yet")))

    async def run(self, job: Job, **hooks: Any) -> Finished:
        """As `EngineClient.run`, wherever the job is done; it begins again elsewhere if its replica is lost, which is harmless."""
        telling = Telling({name: hook for name, hook in hooks.items() if hook})
        if self._draining:
            raise Draining("the server is stopping")
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                return await self._run(job, telling)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed") from None

    async def _run(self, job: Job, telling: Telling) -> Finished:
        arrived_at = time.monotonic()
        for _ in range(LIVES):
            began = time.monotonic()
            try:
                finished = await self._attempt(job, telling)
                timings = replace(finished.timings, queue=finished.timings.queue + began - arrived_at)
                return replace(finished, timings=timings)
            except ELSEWHERE as error:
                lost: Exception = error
            except (RayError, RayServeException) as error:
                lost = WorkerLost(f"a replica was lost: {type(error).__name__}")
            log.warning("begun again elsewhere", extra={"fields": {"job": job.id, "reason": str(lost)}})
            self._metrics.requests_replayed.inc()
        raise lost

    async def _attempt(self, job: Job, telling: Telling) -> Finished:
        """Raises the job's EngineError, or what Ray raises if the replica is lost."""
        # A replica that says at once that it has the job is known to be there.
        hooks = tuple({*telling.hooks, "on_admitted"})
        stream = self._engines.options(stream=True).run.remote(self._sender, job, job.deadline - time.monotonic(), hooks)
        try:
            async with asyncio.timeout(self._settings.start_wait_s) as patience:
                async for message in stream:
                    patience.reschedule(None)
                    if isinstance(message, Finished):
                        return message
                    if isinstance(message, EngineError):
                        raise message
                    telling.tell(message)
        except TimeoutError:
            raise Starting("no replica took the request in time") from None
        finally:
            stream.cancel()
        raise WorkerLost("a replica ended without an answer")

    async def _report_for_ever(self) -> None:
        while True:
            self._reports = [*await self._ask(self._engines), *await self._ask(self._peers)]
            self._fleet.replicas = {report.replica: report.figures for report in self._reports}
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def _ask(self, handle: Any) -> list[Report]:
        """Those that answer: replicas come and go."""
        try:
            answers = await handle.broadcast("report").results_async(timeout_s=REPORT_TIMEOUT_S, return_exceptions=True)
        except Exception as error:
            # Asked again in a second.
            log.warning("no reports", extra={"fields": {"reason": repr(error)[:200]}})
            return []
        return [answer for answer in answers if isinstance(answer, Report)]
