"""Engines on both ends of a Ray handle: `RemoteEngine` in the API, `LocalEngine` in a replica.

A job goes to one of many replicas, and to another if that one is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from server.engine.client import EngineClient
from server.engine.errors import DeadlineExceeded, Draining, EngineError, Starting, WorkerLost
from server.engine.hooks import NO_HOOKS, HookName, Hooks, ReplayFilter
from server.engine.job import Job
from server.engine.messages import Finished
from server.engine.supervisor import WorkerStatus
from server.engine.worker_process import WorkerMain, run_worker
from server.metrics import Metrics
from server.ray_serve.broadcast import Report, Reports
from server.ray_serve.merged_metrics import MergedRegistry
from server.ray_serve.routing import Load, LoadMeter
from server.settings import Settings

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
# Replicas lost under one job after which it fails: the job itself may be the cause.
MAX_ATTEMPTS = 4
# A call of a hook: its name and the arguments.
Call = tuple[HookName, tuple[Any, ...]]
# Errors of one replica where another may succeed.
RETRYABLE = (Draining, Starting, WorkerLost)


class LocalEngine:
    """One `EngineClient` with its workers, in a replica."""

    def __init__(self, settings: Settings, worker: WorkerMain = run_worker) -> None:
        self._metrics = Metrics()
        self._engine = EngineClient(settings, self._metrics, worker)
        self._meter = LoadMeter()
        self._settings = settings
        self._not_ready_since: float | None = None

    async def start(self, timeout_s: float) -> None:
        """Wait until a worker is ready.

        Raises RuntimeError after the timeout, or at once if no worker can ever start.
        """
        await self._engine.start()
        deadline = time.monotonic() + timeout_s
        while not (status := self._engine.status()).ready:
            if status.fatal:
                raise RuntimeError(status.fatal)
            if time.monotonic() > deadline:
                raise RuntimeError(f"no worker was ready within {timeout_s:g} s: {status.reason}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Stop the workers."""
        await self._engine.stop()

    async def run(
        self, sender: str, job: Job, timeout_s: float, hooks: tuple[HookName, ...]
    ) -> AsyncIterator[Call | Finished | EngineError]:
        """Run a job; yield the calls of its hooks as they happen, then the outcome.

        Args:
            sender: the API replica.
            job: the job; its deadline and arrival are replaced.
            timeout_s: seconds until the deadline, because machines have clocks of their own.
            hooks: names of the hooks to report.
        """
        calls: asyncio.Queue[Call | None] = asyncio.Queue()
        deadline = time.monotonic() + timeout_s
        arrived_at = deadline - (job.deadline - job.arrived_at)
        job = replace(job, deadline=deadline, arrived_at=arrived_at)
        reporters = Hooks(**{name: partial(_put, calls, name) for name in hooks})
        work = asyncio.create_task(self._engine.run(job, reporters))
        work.add_done_callback(lambda _: calls.put_nowait(None))
        end = self._meter.begin(sender, job)
        finished = False
        try:
            while (call := await calls.get()) is not None:
                yield call
            outcome = work.exception() or work.result()
            finished = isinstance(outcome, Finished)
            if not isinstance(outcome, Finished | EngineError):
                raise outcome
            yield outcome
        finally:
            end(finished)
            work.cancel()

    def load(self) -> Load:
        """Return the load, for routing."""
        return self._meter.load(self._engine.status().ready)

    @property
    def rows(self) -> int:
        """Unfinished images, for autoscaling."""
        return self._engine.rows_unfinished

    def check(self) -> None:
        """Raise RuntimeError once no worker was ready for `start_wait_s`."""
        status = self._engine.status()
        if status.ready:
            self._not_ready_since = None
            return
        self._not_ready_since = self._not_ready_since or time.monotonic()
        if time.monotonic() - self._not_ready_since > self._settings.start_wait_s:
            raise RuntimeError(status.reason)

    def report(self, replica: str) -> Report:
        """Return status and metrics."""
        metrics = list(self._metrics.registry.collect())
        return Report(replica, self._engine.status(), metrics)


def _put(calls: asyncio.Queue[Call | None], name: HookName, *args: Any) -> None:
    calls.put_nowait((name, args))


class RemoteEngine:
    """All replicas as one engine, in the API: the counterpart of `EngineClient`.

    Attributes:
        own_metrics: registry of this process.
    """

    def __init__(self, settings: Settings, metrics: Metrics, engines: Any, peers: Any) -> None:
        """Create the engine.

        Args:
            settings: the server's.
            metrics: this process's; its registry is replaced by one for all replicas.
            engines: Ray handle of the deployment whose replicas are `LocalEngine`s.
            peers: Ray handle of the API's own deployment.
        """
        self._settings, self._metrics = settings, metrics
        self._engines = engines
        self._sender = ray.get_runtime_context().get_actor_id()
        self._reports = Reports(engines, peers)
        self._draining = False
        self.own_metrics = metrics.registry
        self._merged = metrics.registry = MergedRegistry()

    async def start(self) -> None:
        """Start polling the replicas for reports."""
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Reject new jobs; Ray has waited for the unfinished ones."""
        self._draining = True
        self._polling.cancel()
        await asyncio.gather(self._polling, return_exceptions=True)

    def status(self) -> WorkerStatus:
        """Return ready while any replica is."""
        statuses = [report.status for report in self._reports.recent if report.status]
        if self._draining:
            return WorkerStatus(ready=False, reason="draining")
        ready = (status for status in statuses if status.ready)
        none = WorkerStatus(ready=False, reason="no replica has an engine yet")
        return next(ready, next(iter(statuses), none))

    def check_room(self, rows: int) -> None:
        """Raise Draining; the queues are the replicas' own, which reject in `run`."""
        if self._draining:
            raise Draining("the server is stopping")

    async def run(self, job: Job, hooks: Hooks = NO_HOOKS) -> Finished:
        """Run a job as `EngineClient.run` does, on any replica.

        It restarts elsewhere if its replica is lost, with the same result because it is seeded.
        """
        replay_filter = ReplayFilter(hooks)
        if self._draining:
            raise Draining("the server is stopping")
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                return await self._run(job, replay_filter)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed") from None

    async def _run(self, job: Job, replay_filter: ReplayFilter) -> Finished:
        arrived_at = time.monotonic()
        for _ in range(MAX_ATTEMPTS):
            began = time.monotonic()
            try:
                finished = await self._attempt(job, replay_filter)
                queue = finished.timings.queue + began - arrived_at
                return replace(finished, timings=replace(finished.timings, queue=queue))
            except RETRYABLE as error:
                lost: Exception = error
            except (RayError, RayServeException) as error:
                lost = WorkerLost(f"a replica was lost: {type(error).__name__}")
            fields = {"job": job.id, "reason": str(lost)}
            log.warning("job restarted on another replica", extra={"fields": fields})
            self._metrics.requests_replayed.inc()
        raise lost

    async def _attempt(self, job: Job, replay_filter: ReplayFilter) -> Finished:
        """Run the job on one replica.

        Raises:
            EngineError: the job's.
            RayError, RayServeException: the replica was lost.
        """
        # A replica confirms at once that it has the job, which shows that it is alive.
        hooks = tuple({*replay_filter.hooks.names, "on_admitted"})
        timeout_s = job.deadline - time.monotonic()
        engines = self._engines.options(stream=True)
        stream = engines.run.remote(self._sender, job, timeout_s, hooks)
        try:
            async with asyncio.timeout(self._settings.start_wait_s) as timeout:
                async for message in stream:
                    timeout.reschedule(None)
                    if isinstance(message, Finished):
                        return message
                    if isinstance(message, EngineError):
                        raise message
                    name, args = message
                    replay_filter.call(name, *args)
        except TimeoutError:
            raise Starting("no replica took the request in time") from None
        finally:
            stream.cancel()
        raise WorkerLost("a replica ended without an answer")

    async def _poll(self) -> None:
        while True:
            await self._reports.poll()
            recent = self._reports.recent
            self._merged.replicas = {report.replica: report.metrics for report in recent}
            await asyncio.sleep(REPORT_INTERVAL_S)
