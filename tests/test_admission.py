"""Admission, forecasts, dispatch and replay, against workers that the test plays: no process, no
real clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from server.engine.client import MAX_SOLO_CRASHES, RETRY_FORECAST_S, EngineClient
from server.engine.cpu_share import CALM_S
from server.engine.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    Draining,
    JobFailed,
    QueueFull,
    Starting,
    WorkerLost,
)
from server.engine.hooks import Hooks
from server.engine.job import Job
from server.engine.latency_model import Forecast
from server.engine.messages import (
    Drawn,
    Failed,
    Finished,
    Heartbeat,
    Preview,
    ProcessStats,
    Running,
    Step,
    Timings,
)
from server.engine.supervisor import Listener, WorkerMessage, WorkerStatus
from server.engine.worker_process import WorkerMain
from server.metrics import Metrics, WorkerState
from server.settings import Settings
from tests import fake_worker
from tests.conftest import raised
from tests.support.fake_jobs import PIXELS, SAMPLING, job, picture
from tests.support.virtual_time import START, settle, virtual_time

SLOTS = 4


class PlayedWorker:
    """A supervisor and its worker, played by the test."""

    def __init__(
        self,
        main: WorkerMain,
        settings: Settings,
        metrics: Metrics,
        listener: Listener,
        index: int = 0,
    ) -> None:
        self.settings, self.listener = settings, listener
        self.last_heartbeat = Heartbeat((), 0, 0)
        self.status = WorkerStatus(ready=False, reason="starting")
        self.jobs: dict[str, Job] = {}
        self.received: list[Job] = []
        self.cancelled: list[str] = []
        self.shares: list[int] = []
        self.started = self.stopped = self.silent = False

    @property
    def accepting(self) -> bool:
        return self.status.ready or self.silent

    @property
    def rows_owed(self) -> int:
        return sum(len(each.seeds) for each in self.jobs.values())

    @property
    def state(self) -> WorkerState:
        return WorkerState(self.status.ready, 0.0, self.last_heartbeat.stats)

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True

    @property
    def computes_on_cpu(self) -> bool:
        return bool(self.jobs)

    def share_cpu(self, workers: int) -> None:
        self.shares.append(workers)

    def send(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.listener.on_rows_owed(self)  # type: ignore[arg-type]
        self.received.append(job)

    def cancel(self, id: str) -> None:
        if self.jobs.pop(id, None):
            self.cancelled.append(id)

    # ── the worker's side ─────────────────────────────────────────────────────────────────────────

    def become_ready(self, device: str = "played") -> None:
        self.status = WorkerStatus(ready=True, reason="ready", device=device)
        self.listener.on_worker_ready(self)  # type: ignore[arg-type]

    def say(self, message: WorkerMessage) -> None:
        if isinstance(message, Heartbeat):
            self.last_heartbeat = message
        if isinstance(message, Finished | Failed):
            self.jobs.pop(message.id, None)
        self.listener.on_worker_message(self, message)  # type: ignore[arg-type]

    def measure(self, *steps: tuple[int, float]) -> None:
        """Report steps: (rows, seconds)."""
        self.say(
            Heartbeat(
                tuple(Step(rows, rows, PIXELS, seconds, "fake") for rows, seconds in steps), 0, 0
            )
        )

    def finish(self, id: str, timings: Timings | None = None) -> None:
        images = tuple(picture(i) for i in range(len(self.jobs[id].seeds)))
        self.say(Finished(id, images, timings or Timings()))

    def crash(self, *suspects: str) -> None:
        """Lose every job, and be ready again."""
        lost, self.jobs = frozenset(self.jobs), {}
        self.status = WorkerStatus(ready=False, reason="crashed; another is starting")
        self.listener.on_worker_lost(self, "crashed", lost, frozenset(suspects))  # type: ignore[arg-type]


class Engine:
    """A client, its played workers, and what its callers were told."""

    def __init__(self, client: EngineClient, workers: list[PlayedWorker], metrics: Metrics) -> None:
        self.client, self.workers, self.metrics = client, workers, metrics
        self.worker = workers[0]
        self.forecasts: dict[str, Forecast] = {}

    async def ask(self, job: Job, **hooks: Any) -> asyncio.Task[Finished]:
        """Let the client have a job; return once it is admitted or rejected."""
        keep = hooks.pop("on_admitted", lambda forecast: self.forecasts.update({job.id: forecast}))
        task = asyncio.create_task(self.client.run(job, Hooks(on_admitted=keep, **hooks)))
        await settle()
        return task

    async def forecast(self, job: Job) -> Forecast:
        """Return a job's forecast and cancel the job."""
        task = await self.ask(job)
        if task.done():
            task.result()
        task.cancel()
        await settle()
        return self.forecasts[job.id]

    def figure(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def engine(ready: bool = True, **settings: Any) -> AsyncIterator[Engine]:
    workers: list[PlayedWorker] = []

    def play(*args: Any) -> PlayedWorker:
        workers.append(PlayedWorker(*args))
        return workers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.client.Supervisor", play)
        metrics = Metrics()
        chosen = {"drain_timeout_s": 0, "max_batch_rows": SLOTS, "queue_rows": 64, **settings}
        client = EngineClient(Settings(**chosen), metrics, fake_worker.main)
        await client.start()
        if ready:
            for worker in workers:
                worker.become_ready()
        yield Engine(client, workers, metrics)
        await client.stop()
        await settle()


# ── admission ─────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_batch_work_does_not_delay_interactive_jobs() -> None:
    async with engine() as e:
        e.worker.measure((1, 0.1), (SLOTS, 0.1))
        await e.ask(job(rows=16, priority="batch"))
        interactive, batch = await e.forecast(job()), await e.forecast(job(priority="batch"))
        assert interactive == Forecast(position=0, seconds=pytest.approx(10 * 0.1))
        assert batch.position == 16 + 1 - SLOTS
        assert batch.seconds > 4 * interactive.seconds
        # Nor is one rejected for it, though it has no time for the batch work.
        await e.forecast(job(seconds=1.5))
        await raised(await e.ask(job(seconds=1.5, priority="batch")), DeadlineUnreachable)


@virtual_time
async def test_interactive_work_delays_jobs_of_both_priorities() -> None:
    async with engine() as e:
        e.worker.measure((1, 0.1), (SLOTS, 0.1))
        await e.ask(job(rows=15))
        for priority in ("interactive", "batch"):
            forecast = await e.forecast(job(priority=priority))
            assert forecast == Forecast(position=12, seconds=pytest.approx(4 * 10 * 0.1))


@virtual_time
async def test_steps_that_a_heartbeat_says_are_done_delay_nobody() -> None:
    async with engine() as e:
        e.worker.measure((1, 0.1), (SLOTS, 0.1))
        other = job(rows=SLOTS)
        await e.ask(other)
        before = await e.forecast(job())
        e.worker.say(Heartbeat((), SLOTS, 0, left={other.id: SLOTS}))
        after = await e.forecast(job())
        assert before.seconds == pytest.approx((10 + 10 / SLOTS) * 0.1)
        assert after.seconds < 11 * 0.1


@virtual_time
async def test_a_job_is_rejected_at_once_if_it_would_be_late_and_told_whether_to_come_back() -> (
    None
):
    async with engine() as e:
        e.worker.measure((1, 0.1), (SLOTS, 0.1))
        await e.ask(job(rows=SLOTS))
        late = await raised(await e.ask(job(seconds=1.1)), DeadlineUnreachable)
        assert late.retryable
        assert late.retry_after == pytest.approx(1.25 - 1.1)
        hopeless = await raised(await e.ask(job(seconds=0.9)), DeadlineUnreachable)
        assert not hopeless.retryable
        await e.forecast(job(seconds=1.3))
        assert e.client.rows_unfinished == SLOTS, "rejected jobs leave nothing behind"


@virtual_time
async def test_a_job_that_ends_exactly_at_its_deadline_is_admitted_or_told_to_come_back() -> None:
    async with engine() as e:
        # A binary fraction, so that ten steps are 1.25 s exactly.
        e.worker.measure((1, 0.125), (SLOTS, 0.125))
        await e.forecast(job(seconds=1.25))
        await raised(await e.ask(job(seconds=1.24)), DeadlineUnreachable)
        await e.ask(job(rows=SLOTS))
        assert (await raised(await e.ask(job(seconds=1.25)), DeadlineUnreachable)).retryable
        assert not (await raised(await e.ask(job(seconds=1.24)), DeadlineUnreachable)).retryable


@virtual_time
async def test_a_late_job_is_told_to_come_back_unless_measurements_prove_it_hopeless() -> None:
    async with engine() as e:
        e.worker.measure((1, 0.1), (SLOTS, 0.1))
        await e.ask(job(rows=SLOTS))
        # Steps of 64 times as many pixels were not measured: they need 1 s at least.
        large = job(seconds=1.1, width=256, height=128)
        assert (await raised(await e.ask(large), DeadlineUnreachable)).retryable


@virtual_time
async def test_an_idle_server_tries_a_job_again_when_its_measurements_are_old() -> None:
    async with engine() as e:
        e.worker.measure((1, 100.0))
        await raised(await e.ask(job(seconds=1)), DeadlineUnreachable)
        await asyncio.sleep(RETRY_FORECAST_S)
        await raised(await e.ask(job(seconds=1)), DeadlineUnreachable)
        await asyncio.sleep(0.1)
        held = await e.ask(job(seconds=5))
        assert not held.done()
        await raised(await e.ask(job(seconds=1)), DeadlineUnreachable)  # it is idle no more


@virtual_time
async def test_without_a_measurement_the_pace_of_rows_is_the_forecast() -> None:
    async with engine() as e:
        await e.ask(job(rows=3))
        assert (await e.forecast(job(rows=2))).seconds == pytest.approx(5 * 0.2)


@virtual_time
async def test_the_queue_is_bounded_in_rows_and_a_job_larger_than_it_is_done_alone() -> None:
    async with engine(queue_rows=4) as e:
        large = await e.ask(job(rows=9))
        assert not large.done()
        full = await raised(await e.ask(job()), QueueFull)
        assert full.retry_after == pytest.approx(9 * 0.2)
        large.cancel()
        await settle()
        assert not (await e.ask(job(rows=3))).done()
        assert not (await e.ask(job(rows=1))).done()
        await raised(await e.ask(job()), QueueFull)


@virtual_time
async def test_room_can_be_asked_for_before_a_job_is_made() -> None:
    async with engine(queue_rows=4, queue_bytes=100) as e:
        e.client.check_room(9)
        await e.ask(job(rows=3))
        e.client.check_room(1)
        with pytest.raises(QueueFull) as first:
            e.client.check_room(2)
        with pytest.raises(QueueFull) as second:
            e.client.check_room(2)
        assert 0 < first.value.retry_after < second.value.retry_after
        await e.client.stop()
        with pytest.raises(Draining):
            e.client.check_room(1)


@virtual_time
async def test_room_in_a_full_queue_is_expected_once_enough_of_the_oldest_jobs_are_done() -> None:
    async with engine(queue_rows=6) as e:
        for rows in (1, 2, 3):
            await e.ask(job(rows=rows))
        assert (await raised(await e.ask(job()), QueueFull)).retry_after == pytest.approx(0.2)
        large = job(rows=4)
        # Of its four rows none fits: 1 + 2 + 3 rows must be done. Its own slot is later than that
        # of the client before it anyway.
        assert (await raised(await e.ask(large), QueueFull)).retry_after == pytest.approx(6 * 0.2)


@virtual_time
async def test_the_queue_is_bounded_in_bytes_and_has_room_once_the_oldest_jobs_are_done() -> None:
    async with engine(queue_bytes=100) as e:
        for size in (60, 39):
            await e.ask(job(held_bytes=size))
        e.client.check_room(1)
        assert not (await e.ask(job(held_bytes=1))).done(), "exactly the bound"
        with pytest.raises(QueueFull):
            e.client.check_room(1)
        assert not (await e.ask(job())).done()
        for size, jobs in {1: 1, 60: 1, 61: 2, 99: 2, 100: 3}.items():
            await asyncio.sleep(100)  # the slots of earlier rejections are past
            full = await raised(await e.ask(job(held_bytes=size)), QueueFull)
            assert full.retry_after == pytest.approx(jobs * 0.2), size


@virtual_time
async def test_each_rejected_client_is_told_a_later_time_than_the_one_before() -> None:
    async with engine(queue_rows=4) as e:
        await e.ask(job(rows=4))
        told = [(await raised(await e.ask(job(rows=2)), QueueFull)).retry_after for _ in range(9)]
        assert told == pytest.approx([4 * 0.2 + i * 2 * 0.2 for i in range(9)])
        # Slots belong to moments, not to waits.
        await asyncio.sleep(1)
        assert (await raised(await e.ask(job()), QueueFull)).retry_after == pytest.approx(
            told[-1] + 0.2 - 1
        )
        await asyncio.sleep(100)
        assert (await raised(await e.ask(job()), QueueFull)).retry_after == pytest.approx(0.8)


@virtual_time
async def test_late_jobs_are_told_different_times_too_unless_a_retry_is_in_vain() -> None:
    async with engine() as e:
        e.worker.measure((1, 0.1), (SLOTS, 0.1))
        await e.ask(job(rows=SLOTS))

        async def told(seconds: float) -> float:
            error = await raised(await e.ask(job(seconds=seconds)), DeadlineUnreachable)
            return float(error.retry_after)

        assert [await told(1.1) for _ in range(3)] == pytest.approx([0.15, 0.35, 0.55])
        assert await told(0.9) == pytest.approx(0.35)
        assert await told(1.1) == pytest.approx(0.75)


@virtual_time
async def test_rejected_clients_who_retry_as_told_are_all_served_in_two_retries() -> None:
    """As many clients as an SDK with two retries brings, six times what the queue holds."""
    async with engine(queue_rows=4) as e:

        async def serve() -> None:
            while True:
                await asyncio.sleep(0.2)
                if e.worker.jobs:
                    e.worker.finish(next(iter(e.worker.jobs)))

        async def client() -> int:
            for attempt in range(3):
                try:
                    await e.client.run(job())
                    return attempt
                except QueueFull as full:
                    await asyncio.sleep(full.retry_after)
            return -1

        serving = asyncio.create_task(serve())
        attempts = await asyncio.gather(*(client() for _ in range(25)))
        serving.cancel()
        assert -1 not in attempts
        assert attempts.count(0) == 4


@virtual_time
async def test_no_job_is_rejected_on_an_extrapolation() -> None:
    async with engine() as e:
        # Small pictures of one step, as T25 has it: 128 pixels a side would be 64 times as many.
        e.worker.measure((1, 0.1))
        small = job(sampling=replace(SAMPLING, steps=1))
        await e.ask(small)
        e.worker.finish(small.id, Timings(encode=0.01, decode=0.5))
        await settle()
        large = job(seconds=10, width=256, height=128, sampling=replace(SAMPLING, steps=64))
        forecast = await e.forecast(large)
        assert forecast.seconds == pytest.approx(64 * 64 * 0.1 + 64 * 0.51), "clients are told so"
        # More rows than were ever stepped together, and weights that were never measured.
        await e.forecast(job(rows=SLOTS, seconds=3.1))
        await e.forecast(job(seconds=0.1, model="other"))
        # What was measured does reject, as does what is proven by it.
        await raised(await e.ask(job(seconds=0.9)), DeadlineUnreachable)
        await raised(await e.ask(job(seconds=0.9, width=256, height=128)), DeadlineUnreachable)


@virtual_time
async def test_the_pace_follows_finished_jobs() -> None:
    async with engine(queue_rows=4) as e:
        for _ in range(60):
            each = job(rows=4)
            await e.ask(each)
            await asyncio.sleep(2)
            e.worker.finish(each.id)
            await settle()
        await e.ask(job(rows=4))
        full = await raised(await e.ask(job()), QueueFull)
        assert full.retry_after == pytest.approx(4 * 0.5, rel=0.01)


@virtual_time
async def test_a_passed_deadline_is_no_admission() -> None:
    async with engine() as e:
        await asyncio.sleep(1)
        await raised(await e.ask(job(seconds=0)), DeadlineExceeded)
        assert e.worker.received == []


# ── dispatch and answers ──────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_job_goes_to_the_worker_that_owes_the_fewest_rows() -> None:
    async with engine(devices="cpu,cpu") as e:
        for rows in (2, 1, 2, 1):
            await e.ask(job(rows=rows))
        assert [[len(each.seeds) for each in worker.received] for worker in e.workers] == [
            [2, 1],
            [1, 2],
        ]
        assert [worker.settings.devices for worker in e.workers] == [None, None]


@virtual_time
async def test_workers_that_compute_share_the_cpu_until_one_is_alone_for_a_while() -> None:
    async with engine(devices="cpu,cpu") as e:
        first, second = job(), job()
        await e.ask(first)
        assert [worker.shares[-1:] for worker in e.workers] == [[1], []]
        await e.ask(second)
        assert [worker.shares[-1] for worker in e.workers] == [2, 2]
        e.workers[1].finish(second.id)
        await asyncio.sleep(CALM_S / 2)
        e.worker.say(Heartbeat((), 1, 0))
        assert e.worker.shares[-1] == 2
        await asyncio.sleep(CALM_S)
        e.worker.say(Heartbeat((), 1, 0))
        assert e.worker.shares[-1] == 1


@virtual_time
async def test_every_worker_s_slots_count() -> None:
    async with engine(devices="cpu,cpu") as e:
        e.worker.measure((1, 0.1), (8, 0.1))
        await e.ask(job(rows=8))
        assert (await e.forecast(job())).position == 1


@virtual_time
async def test_slots_of_a_worker_that_is_down_do_not_count() -> None:
    async with engine(devices="cpu,cpu") as e:
        e.worker.measure((1, 0.1), (4, 0.1), (8, 0.1))
        await e.ask(job(rows=8))
        both = await e.forecast(job())
        e.workers[1].crash()
        one = await e.forecast(job())
        assert (both.position, one.position) == (1, 5)
        assert one.seconds > both.seconds
        e.workers[0].crash()
        assert (await e.forecast(job())).position == 1, "both are about to be ready again"


@virtual_time
async def test_an_answer_s_queue_time_counts_from_the_request_on() -> None:
    async with engine(ready=False) as e:
        waiting = job()
        task = await e.ask(waiting)
        await asyncio.sleep(3)
        e.worker.become_ready()
        await asyncio.sleep(2)
        e.worker.finish(waiting.id, Timings(queue=0.5, denoise=1.5))
        answer = await task
        assert answer.timings == Timings(queue=3.5, denoise=1.5)
        assert e.figure("paella_queue_duration_seconds_sum") == pytest.approx(3.5)
        assert e.client.rows_unfinished == 0


@virtual_time
async def test_time_around_the_steps_is_part_of_later_forecasts() -> None:
    async with engine() as e:
        e.worker.measure((1, 0.1))
        first = job()
        await e.ask(first)
        e.worker.finish(first.id, Timings(encode=0.2, decode=0.3, denoise=7.0))
        await settle()
        assert (await e.forecast(job())).seconds == pytest.approx(10 * 0.1 + 0.5)


@virtual_time
async def test_requests_wait_for_a_starting_worker_as_long_as_the_settings_say() -> None:
    async with engine(ready=False, start_wait_s=7) as e:
        task = await e.ask(job())
        assert e.client.status().reason == "starting; requests waiting: 1"
        await asyncio.sleep(6.9)
        assert not task.done()
        await asyncio.sleep(0.2)
        assert "starting" in str(await raised(task, Starting))
        assert time.monotonic() - START == pytest.approx(7.1)


@virtual_time
async def test_a_deadline_that_passes_before_a_worker_is_ready_is_answered_as_starting() -> None:
    async with engine(ready=False, start_wait_s=7) as e:
        task = await e.ask(job(seconds=1))
        await asyncio.sleep(1.1)
        assert "starting" in str(await raised(task, Starting))


@virtual_time
async def test_a_worker_that_is_ready_in_time_ends_the_wait() -> None:
    async with engine(ready=False, start_wait_s=7) as e:
        task = await e.ask(job())
        await asyncio.sleep(5)
        e.worker.become_ready()
        await asyncio.sleep(60)
        assert not task.done()
        assert len(e.worker.received) == 1


@virtual_time
async def test_a_worker_that_becomes_ready_gets_the_jobs_that_no_other_has() -> None:
    async with engine(ready=False, devices="cpu,cpu") as e:
        await e.ask(job())
        for worker in e.workers:
            worker.become_ready()
        assert [len(worker.received) for worker in e.workers] == [1, 0]


@virtual_time
async def test_a_job_ends_at_its_deadline_and_frees_the_worker() -> None:
    async with engine() as e:
        held = job(seconds=3)
        await raised(await e.ask(held), DeadlineExceeded)
        assert time.monotonic() - START == pytest.approx(3)
        assert e.worker.cancelled == [held.id]


@virtual_time
async def test_cancelling_the_caller_frees_the_worker_and_is_counted_by_place() -> None:
    async with engine(ready=False) as e:
        queued = await e.ask(job())
        queued.cancel()
        await settle()
        e.worker.become_ready()
        assert e.worker.received == []
        held = [job(), job(), job()]
        sent, started, replayed = [await e.ask(each) for each in held]
        e.worker.say(Running((held[1].id,)))
        for task in (sent, started):
            task.cancel()
        await settle()
        assert e.worker.cancelled == [held[0].id, held[1].id]
        e.worker.say(Running((held[2].id,)))
        e.worker.crash()
        replayed.cancel()
        await settle()
        assert [
            e.figure("paella_cancelled_total", stage=stage) for stage in ("queue", "worker")
        ] == [3, 1]


@virtual_time
async def test_failures_are_told_to_their_own_caller_and_logged_but_for_passed_deadlines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with engine() as e:
        one, other, late = job(), job(), job()
        tasks = [await e.ask(each) for each in (one, other, late)]
        e.worker.say(Failed(one.id, "out_of_memory", "no memory", retryable=True))
        e.worker.say(Failed(late.id, "deadline", "the deadline passed", retryable=True))
        e.worker.say(Failed("unknown", "internal", "", retryable=False))
        failure = await raised(tasks[0], JobFailed)
        assert (failure.code, failure.message, failure.retryable) == (
            "out_of_memory",
            "no memory",
            True,
        )
        await raised(tasks[2], DeadlineExceeded)
        assert not tasks[1].done()
        failed = [record.fields["job"] for record in caplog.records if record.msg == "job failed"]
        assert failed == [one.id, "unknown"]


@virtual_time
async def test_messages_about_a_job_that_nobody_waits_for_are_ignored() -> None:
    async with engine() as e:
        (await e.ask(gone := job())).cancel()
        await settle()
        for message in (
            Preview(gone.id, 0, 1, picture(0)),
            Drawn(gone.id, picture(0)),
            Running((gone.id,)),
        ):
            e.worker.say(message)
        e.worker.say(Finished(gone.id, (), Timings()))
        assert not (await e.ask(job())).done()


@virtual_time
async def test_a_job_that_has_its_answer_already_is_told_nothing_more() -> None:
    async with engine() as e:
        told: list[object] = []
        early = job(early=True, previews=1)
        hooks = dict.fromkeys(("on_drawn", "on_preview"), told.append)
        task = await e.ask(early, **hooks, on_started=lambda: told.append("started"))
        e.worker.say(Failed(early.id, "internal", "", retryable=False))
        for message in (
            Running((early.id,)),
            Preview(early.id, 0, 1, picture(0)),
            Drawn(early.id, picture(0)),
        ):
            e.worker.say(message)
        await raised(task, JobFailed)
        assert told == []


@virtual_time
async def test_heartbeats_become_figures() -> None:
    async with engine(devices="cpu,cpu") as e:
        for worker in e.workers:
            stats = ProcessStats(1, 1.0, 1)
            counts = {("prompt_cache_hits", "text"): 2}
            worker.say(
                Heartbeat(
                    (Step(2, 2, PIXELS, 0.1),), 3, 0, counts=counts, cache_bytes=5, stats=stats
                )
            )
        assert e.figure("paella_queue_depth") == 0
        assert [e.figure("paella_worker_ready", worker=number) for number in "01"] == [1, 1]
        await e.ask(job(rows=10))
        assert e.client.rows_running == e.figure("paella_rows_running") == 6
        assert e.figure("paella_queue_depth") == 4
        assert e.figure("paella_prompt_cache_bytes") == 10
        assert e.figure("paella_prompt_cache_hits_total", what="text") == 4
        assert e.figure("paella_step_rows_count") == 2


# ── replay ────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_replay_delivers_each_image_and_preview_once_and_starts_once() -> None:
    async with engine() as e:
        drawn: list[int] = []
        previews: list[tuple[int, int]] = []
        starts: list[str] = []
        early = job(rows=2, early=True, previews=3)
        task = await e.ask(
            early,
            on_drawn=lambda message: drawn.append(message.image.index),
            on_preview=lambda message: previews.append((message.image.index, message.number)),
            on_started=lambda: starts.append("started"),
        )
        e.worker.say(Running((early.id,)))
        for index, number in ((0, 0), (0, 1), (1, 0)):
            e.worker.say(Preview(early.id, number, number + 1, picture(index)))
        e.worker.say(Drawn(early.id, picture(0)))
        e.worker.crash()
        e.worker.become_ready()
        e.worker.say(Running((early.id,)))
        for index, number in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            e.worker.say(Preview(early.id, number, number + 1, picture(index)))
        for index in (1, 0):
            e.worker.say(Drawn(early.id, picture(index)))
        e.worker.finish(early.id)
        await task
        assert drawn == [0, 1]
        assert previews == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]
        assert starts == ["started"]
        assert e.figure("paella_requests_replayed_total") == 1


@virtual_time
async def test_only_suspects_run_alone_and_others_of_their_stage_get_another_chance() -> None:
    async with engine() as e:
        first, second, bystander = job(), job(), job()
        tasks = [await e.ask(each) for each in (first, second, bystander)]
        for _ in range(MAX_SOLO_CRASHES + 1):
            e.worker.crash(first.id, second.id)
            e.worker.become_ready()
        replayed = e.worker.received[-3:]
        assert {each.id: each.alone for each in replayed} == {
            first.id: True,
            second.id: True,
            bystander.id: False,
        }
        assert not any(task.done() for task in tasks)


@virtual_time
async def test_a_job_that_crashes_workers_by_itself_is_abandoned_and_its_neighbour_is_not() -> None:
    async with engine() as e:
        poison, bystander = job(), job()
        task, other = await e.ask(poison), await e.ask(bystander)
        for crash in range(MAX_SOLO_CRASHES):
            assert not task.done(), crash
            e.worker.crash(poison.id)
            e.worker.become_ready()
        failure = await raised(task, JobFailed)
        assert (failure.code, failure.retryable) == ("poison", False)
        assert not other.done()
        assert [each.id for each in e.worker.received[2:]] == [
            poison.id,
            bystander.id,
            bystander.id,
        ]
        assert e.figure("paella_requests_replayed_total") == 3


@virtual_time
async def test_jobs_of_a_lost_worker_go_to_another_or_wait_as_long_as_the_settings_say() -> None:
    async with engine(devices="cpu,cpu", start_wait_s=7) as e:
        one, two = e.workers
        tasks = [await e.ask(job()) for _ in range(2)]
        one.crash()
        assert two.rows_owed == 2
        two.crash()
        await asyncio.sleep(6.9)
        assert not any(task.done() for task in tasks)
        await asyncio.sleep(0.2)
        for task in tasks:
            assert "crashed" in str(await raised(task, WorkerLost))


@virtual_time
async def test_a_job_that_was_answered_is_not_replayed() -> None:
    async with engine() as e:
        late = job(rows=1)
        await e.ask(late)
        e.worker.say(Failed(late.id, "internal", "", retryable=False))
        e.worker.jobs[late.id] = late
        e.worker.crash()
        assert e.figure("paella_requests_replayed_total") == 0


# ── status and stop ───────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_the_server_is_ready_while_any_worker_is() -> None:
    async with engine(ready=False, devices="cpu,cpu") as e:
        assert all(worker.started for worker in e.workers)
        assert (e.client.status().ready, e.client.status().reason) == (False, "starting")
        e.workers[1].become_ready()
        assert (e.client.status().ready, e.client.status().reason) == (True, "ready")
        e.workers[0].become_ready()
        e.workers[1].crash()
        assert (e.client.status().ready, e.client.status().reason) == (True, "ready")


@virtual_time
async def test_a_silent_worker_is_the_last_to_get_a_job() -> None:
    async with engine(devices="cpu,cpu") as e:
        e.workers[0].silent = True
        e.workers[0].status = WorkerStatus(False, "silent")
        await e.ask(job(rows=3))
        await e.ask(job())
        assert [len(worker.jobs) for worker in e.workers] == [0, 2]


@virtual_time
async def test_what_waits_for_a_worker_that_can_never_start_is_ended_at_once() -> None:
    async with engine(ready=False, devices="cpu,cpu", drain_timeout_s=30) as e:
        e.workers[1].status = WorkerStatus(False, "no such device", fatal="no such device")
        waiting = await e.ask(job())
        assert e.client.status().fatal
        assert e.client.status().reason == "no such device; requests waiting: 1"
        await e.client.stop()
        await raised(waiting, Draining)
        assert time.monotonic() == START


@virtual_time
async def test_stopping_rejects_new_jobs_and_gives_the_unfinished_ones_the_drain_timeout() -> None:
    async with engine(drain_timeout_s=5) as e:
        quick, stuck = job(), job()
        tasks = [await e.ask(each) for each in (quick, stuck)]
        stopping = asyncio.create_task(e.client.stop())
        await settle()
        assert (e.client.status().ready, e.client.status().reason) == (False, "draining")
        await raised(await e.ask(job()), Draining)
        await asyncio.sleep(3)
        e.worker.finish(quick.id)
        assert (await tasks[0]).id == quick.id
        assert not e.worker.stopped
        await raised(tasks[1], Draining)
        assert time.monotonic() - START == pytest.approx(5)
        await stopping
        assert e.worker.stopped


@virtual_time
async def test_a_start_that_fails_stops_the_workers_that_were_started() -> None:
    async with engine(ready=False, devices="cpu,cpu") as e:

        async def refuse() -> None:
            raise OSError("no process")

        e.workers[1].start = refuse  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no process"):
            await e.client.start()
        assert e.worker.stopped


@virtual_time
async def test_stopping_waits_for_a_worker_though_another_can_never_start() -> None:
    async with engine(devices="cpu,cpu", drain_timeout_s=5) as e:
        e.workers[1].status = WorkerStatus(False, "no such device", fatal="no such device")
        task = await e.ask(begun := job())
        stopping = asyncio.create_task(e.client.stop())
        await asyncio.sleep(3)
        assert not task.done()
        e.workers[0].finish(begun.id)
        assert (await task).id == begun.id
        await stopping


@virtual_time
async def test_stopping_an_idle_server_waits_for_nothing() -> None:
    async with engine(drain_timeout_s=5) as e:
        await e.client.stop()
        assert e.worker.stopped
        assert time.monotonic() == START
