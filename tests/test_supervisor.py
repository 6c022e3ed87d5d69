"""One supervisor and the processes that it starts, played by the test: restarts, stalls,
suspects, and no real clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Never

import pytest

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
    ProcessStats,
    Ready,
    Running,
    ShareCPU,
    Timings,
    ToWorker,
)
from server.engine.supervisor import Supervisor, WorkerMessage
from server.engine.worker_process import EXIT_GRACE_S, WorkerMain
from server.metrics import Metrics
from server.settings import Settings
from tests import fake_worker
from tests.support.fake_jobs import job, picture
from tests.support.virtual_time import START, settle, virtual_time

STALL_S, START_S = 8.0, 60.0
STARTING = "starting"


class PlayedProcess:
    """A worker process that does what the test says, and nothing else."""

    def __init__(
        self, main: WorkerMain, settings: Settings, on_message: Callable[[FromWorker], None]
    ) -> None:
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.say = on_message
        self.started_at = 0.0
        self.received: list[ToWorker] = []
        self.grace_s: float | None = None

    def start(self) -> None:
        self.started_at = time.monotonic() - START

    def send(self, message: ToWorker) -> None:
        self.received.append(message)

    def kill(self) -> None:
        self.exit(-9)

    def exit(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(code)

    async def stop(self, grace_s: float) -> None:
        self.grace_s = grace_s


class Listener:
    """Everything that a supervisor reports."""

    def __init__(self) -> None:
        self.ready = 0
        self.messages: list[WorkerMessage] = []
        self.losses: list[tuple[str, frozenset[str], frozenset[str]]] = []
        self.owed: list[int] = []

    def on_rows_owed(self, worker: Supervisor) -> None:
        self.owed.append(worker.rows_owed)

    def on_worker_ready(self, worker: Supervisor) -> None:
        self.ready += 1

    def on_worker_message(self, worker: Supervisor, message: WorkerMessage) -> None:
        self.messages.append(message)

    def on_worker_lost(
        self, worker: Supervisor, reason: str, unfinished: frozenset[str], suspects: frozenset[str]
    ) -> None:
        self.losses.append((reason, unfinished, suspects))


class Setting:
    """A started supervisor and its surroundings. refusals: starts that the system grants no
    process to.
    """

    def __init__(self) -> None:
        self.processes: list[PlayedProcess] = []
        self.listener, self.metrics = Listener(), Metrics()
        self.refusals = 0

    def process(self, *args: Any) -> PlayedProcess:
        if self.refusals:
            self.refusals -= 1
            raise OSError("no process")
        self.processes.append(PlayedProcess(*args))
        return self.processes[-1]

    @property
    def now(self) -> PlayedProcess:
        """The present process."""
        return self.processes[-1]

    def figure(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


@asynccontextmanager
async def supervised(
    ready: bool = True, **settings: Any
) -> AsyncIterator[tuple[Supervisor, Setting]]:
    setting = Setting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.supervisor.WorkerProcess", setting.process)
        limits = {"stall_timeout_s": STALL_S, "start_timeout_s": START_S}
        chosen = Settings(**{**limits, **settings})
        supervisor = Supervisor(fake_worker.main, chosen, setting.metrics, setting.listener)
        await supervisor.start()
        if ready:
            setting.now.say(Ready("cpu", "float32"))
        await settle()
        yield supervisor, setting
        await supervisor.stop()


# ── the share of a CPU ────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_a_worker_is_told_its_share_once_and_each_new_process_anew() -> None:
    async with supervised(start_timeout_s=1000) as (supervisor, s):
        for workers in (1, 2, 2, 1):
            supervisor.share_cpu(workers)
        assert s.now.received == [ShareCPU(2), ShareCPU(1)]
        supervisor.share_cpu(2)
        s.now.exit(1)
        await asyncio.sleep(1)
        s.now.say(Ready("cpu", "float32"))
        supervisor.share_cpu(2)
        assert s.now.received == [ShareCPU(2)]


@virtual_time
async def test_each_change_of_what_a_worker_owes_is_reported_before_it_learns_of_it() -> None:
    async with supervised() as (supervisor, s):
        told: list[int] = []
        s.listener.on_rows_owed = lambda worker: told.append(len(s.now.received))  # type: ignore[method-assign]
        one, other = job(), job()
        for each in (one, other):
            supervisor.send(each)
        assert told == [0, 1]
        assert supervisor.computes_on_cpu
        supervisor.cancel(one.id)
        s.now.say(Dropped(one.id))
        s.now.say(Finished(other.id, (), Timings()))
        assert len(told) == 4
        assert not supervisor.computes_on_cpu


@virtual_time
async def test_a_worker_on_another_device_does_not_compute_on_the_cpu() -> None:
    async with supervised(ready=False) as (supervisor, s):
        s.now.say(Ready("cuda:0", "float16"))
        supervisor.send(job())
        assert not supervisor.computes_on_cpu


# ── restarts ──────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_the_log_says_when_each_worker_is_ready_and_what_it_computes_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="server")
    async with supervised(ready=False) as (_, s):
        await asyncio.sleep(7)
        s.now.say(Ready("cpu", "bfloat16", 2, compiled=True))
        s.now.exit(1)
        await asyncio.sleep(1)
        s.now.say(Ready("cpu", "float32", 1))
    lines = [line.__dict__["fields"] for line in caplog.records if line.msg == "worker ready"]
    shared = {"worker": 0, "device": "cpu"}
    assert lines == [
        {**shared, "load_s": 7, "dtype": "bfloat16", "threads": 2, "compiled": True},
        {**shared, "load_s": 0.8, "dtype": "float32", "threads": 1, "compiled": False},
    ]


@virtual_time
async def test_restarts_are_delayed_ever_longer_up_to_half_a_minute() -> None:
    async with supervised(ready=False, start_timeout_s=1000) as (_, s):
        delays = []
        for _ in range(11):
            began = time.monotonic() - START
            s.now.exit(1)
            await asyncio.sleep(100)
            delays.append(round(s.now.started_at - began, 3))
        assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30]
        assert s.figure("paella_worker_restarts_total") == 11


@virtual_time
@pytest.mark.parametrize(
    "answer", [Finished("a", (), Timings()), Failed("a", "internal", "", retryable=False)]
)
async def test_the_delay_begins_again_after_a_worker_has_answered_and_not_before(
    answer: WorkerMessage,
) -> None:
    async with supervised(start_timeout_s=1000) as (_, s):

        async def delay() -> float:
            began = time.monotonic() - START
            s.now.exit(1)
            await asyncio.sleep(100)
            return round(s.now.started_at - began, 3)

        assert [await delay() for _ in range(3)] == [0.2, 0.4, 0.8]
        s.now.say(Ready("cpu", "float32"))
        assert await delay() == 1.6
        s.now.say(answer)
        assert await delay() == 0.2


@virtual_time
async def test_a_process_that_the_system_refuses_is_asked_for_again_after_a_longer_delay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with supervised(start_timeout_s=1000) as (_, s):
        s.refusals = 2
        s.now.exit(1)
        with caplog.at_level(logging.CRITICAL, logger="server"):
            await asyncio.sleep(100)
        assert s.now.started_at == pytest.approx(0.2 + 0.4 + 0.8)
        assert s.figure("paella_worker_restarts_total") == 1


@virtual_time
async def test_the_status_tells_why_no_job_would_be_started() -> None:
    async with supervised(ready=False) as (supervisor, s):
        assert (supervisor.status.ready, supervisor.status.reason) == (False, STARTING)
        assert not supervisor.accepting
        s.now.say(Ready("cpu", "bfloat16"))
        assert supervisor.accepting
        assert s.listener.ready == 1
        assert (supervisor.status.reason, supervisor.status.device, supervisor.status.dtype) == (
            "ready",
            "cpu",
            "bfloat16",
        )
        s.now.exit(3)
        await settle()
        assert (supervisor.status.ready, supervisor.status.reason) == (
            False,
            "the worker exited with code 3; another is starting",
        )
        assert not supervisor.accepting


@virtual_time
async def test_a_failed_first_start_is_fatal_if_its_reason_lasts() -> None:
    async with supervised(ready=False) as (supervisor, s):
        s.now.say(Crashed("device 'cuda' is not there", lasting=True))
        s.now.exit(1)
        await settle()
        reason = "the worker did not start: device 'cuda' is not there"
        assert supervisor.status.reason == f"{reason}; another is starting"
        assert supervisor.status.fatal == reason
        assert s.listener.losses[0][0] == reason
        # An embedding program may ignore it, and the reason may go away after all.
        await asyncio.sleep(1)
        assert len(s.processes) == 2
        s.now.say(Ready("cuda", "float16"))
        assert not supervisor.status.fatal


@virtual_time
async def test_a_passing_reason_a_later_start_and_a_crash_at_work_are_not_fatal() -> None:
    async with supervised(ready=False) as (supervisor, s):
        s.now.say(Crashed("OutOfMemoryError: 2 GiB", lasting=False))
        s.now.exit(1)
        await asyncio.sleep(1)
        assert not supervisor.status.fatal
        s.now.say(Crashed("truncated", lasting=True))
        s.now.exit(1)
        await asyncio.sleep(1)
        assert (
            supervisor.status.reason == "the worker did not start: truncated; another is starting"
        )
        assert not supervisor.status.fatal
        s.now.say(Ready("cpu", "float32"))
        s.now.say(Crashed("the device failed", lasting=False))
        s.now.exit(70)
        await asyncio.sleep(10)
        assert s.listener.losses[-1][0] == "the worker crashed: the device failed"
        # The next one has said nothing.
        s.now.exit(-9)
        await settle()
        assert supervisor.status.reason == "the worker exited with code -9; another is starting"


@virtual_time
async def test_a_lasting_crash_of_a_worker_that_was_ready_is_not_fatal() -> None:
    async with supervised() as (supervisor, s):
        s.now.say(Crashed("no such file", lasting=True))
        s.now.exit(1)
        await settle()
        reason = "the worker crashed: no such file; another is starting"
        assert supervisor.status.reason == reason
        assert supervisor.status.fatal is None


# ── stalls ────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
@pytest.mark.parametrize("at_work", [True, False])
async def test_a_worker_that_is_silent_for_too_long_is_killed_at_work_or_idle(
    at_work: bool,
) -> None:
    async with supervised() as (supervisor, s):
        s.now.say(Heartbeat((), 0, 0))
        if at_work:
            supervisor.send(job())
        await asyncio.sleep(STALL_S - 0.01)
        assert (supervisor.status.ready, supervisor.state.silent_s) == (
            True,
            pytest.approx(STALL_S - 0.01),
        )
        await asyncio.sleep(0.02)
        silence = "the worker has not answered for 8 s"
        assert (supervisor.status.ready, supervisor.status.reason) == (False, silence)
        # It may still answer, so jobs are sent until it is killed.
        assert supervisor.accepting
        await asyncio.sleep(STALL_S / 4 + 0.1)
        assert s.listener.losses[0][0] == f"{silence} and was killed"
        await asyncio.sleep(1)
        assert len(s.processes) == 2


@virtual_time
async def test_every_message_ends_the_silence() -> None:
    async with supervised() as (supervisor, s):
        supervisor.send(held := job())
        for message in (*[Heartbeat((), 1, 0)] * 5, Finished(held.id, (), Timings())):
            await asyncio.sleep(STALL_S - 0.1)
            s.now.say(message)
            assert supervisor.state.silent_s == 0
        for _ in range(5):
            await asyncio.sleep(STALL_S - 0.1)
            s.now.say(Heartbeat((), 0, 0))
        assert supervisor.status.ready
        assert len(s.processes) == 1


@virtual_time
async def test_a_worker_that_loads_for_too_long_is_killed_and_the_next_has_as_long() -> None:
    async with supervised(ready=False) as (supervisor, s):
        await asyncio.sleep(START_S - 0.1)
        assert (len(s.processes), supervisor.status.reason) == (1, STARTING)
        await asyncio.sleep(STALL_S / 4 + 0.2)
        reason = "the worker was not ready after 60 s and was killed"
        assert supervisor.status.reason == f"{reason}; another is starting"
        await asyncio.sleep(START_S - 0.1)
        assert len(s.processes) == 2
        s.now.say(Ready("cpu", "float32"))
        assert supervisor.status.ready


@virtual_time
@pytest.mark.parametrize(
    ("ready", "event", "reason"),
    [
        (True, "worker stalled", "the worker has not answered for 8 s"),
        (False, "worker start timed out", "the worker was not ready after 60 s"),
    ],
)
async def test_a_worker_that_takes_long_to_end_is_killed_again_and_logged_once(
    caplog: pytest.LogCaptureFixture, ready: bool, event: str, reason: str
) -> None:
    async with supervised(ready) as (_, s):
        kills: list[PlayedProcess] = []
        s.now.kill = lambda: kills.append(s.now)  # type: ignore[method-assign]
        await asyncio.sleep(START_S + 2 * STALL_S)
        assert len(kills) > 1
        lines = [record for record in caplog.records if record.msg == event]
        assert [line.__dict__["fields"] for line in lines] == [{"reason": reason}]
        s.now.exit(-9)
        await settle()
        assert s.listener.losses[0][0] == f"{reason} and was killed"


@virtual_time
async def test_a_worker_is_not_blamed_for_the_time_in_which_the_api_process_stood_still() -> None:
    async with supervised() as (_, s):
        loop = asyncio.get_running_loop()
        loop.selector.now += 10 * STALL_S  # type: ignore[attr-defined]
        await asyncio.sleep(STALL_S / 2)
        s.now.say(Heartbeat((), 0, 0))
        await asyncio.sleep(STALL_S / 2)
        assert len(s.processes) == 1


@virtual_time
async def test_a_loading_worker_is_not_taken_for_silent_after_the_api_process_stood_still() -> None:
    async with supervised(ready=False, start_timeout_s=1000) as (supervisor, s):
        loop = asyncio.get_running_loop()
        loop.selector.now += 10 * STALL_S  # type: ignore[attr-defined]
        await asyncio.sleep(10 * STALL_S)
        assert supervisor.state.silent_s == 0
        assert len(s.processes) == 1


@virtual_time
async def test_a_second_job_does_not_end_the_silence() -> None:
    async with supervised() as (supervisor, _):
        supervisor.send(job())
        await asyncio.sleep(STALL_S - 1)
        supervisor.send(job())
        assert supervisor.state.silent_s == pytest.approx(STALL_S - 1)


@virtual_time
async def test_a_new_worker_is_not_blamed_for_the_silence_of_the_one_before_it() -> None:
    async with supervised(start_timeout_s=1000) as (supervisor, s):
        supervisor.send(job())
        s.now.say(Heartbeat((), 5, 0, stats=ProcessStats(1, 1.0, 1)))
        s.now.exit(1)
        await asyncio.sleep(60)
        assert supervisor.state.silent_s == 0
        assert supervisor.state.usage is None
        assert supervisor.last_heartbeat.rows_running == 0
        assert len(s.processes) == 2


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────


@virtual_time
async def test_unfinished_jobs_of_a_lost_worker_are_named_and_its_last_stage_suspected() -> None:
    async with supervised() as (supervisor, s):
        done, running, waiting, cancelled = (job() for _ in range(4))
        for each in (done, running, waiting, cancelled):
            supervisor.send(each)
        s.now.say(Running((waiting.id, done.id)))
        s.now.say(Running((done.id, running.id, cancelled.id)))
        s.now.say(Finished(done.id, (), Timings()))
        supervisor.cancel(cancelled.id)
        s.now.exit(1)
        await settle()
        ((_, unfinished, suspects),) = s.listener.losses
        assert unfinished == {running.id, waiting.id}
        assert suspects == {running.id}
        assert supervisor.rows_owed == 0


@virtual_time
async def test_the_next_worker_s_jobs_are_no_suspects_of_the_one_before_it() -> None:
    async with supervised() as (supervisor, s):
        supervisor.send(first := job())
        s.now.say(Running((first.id,)))
        s.now.exit(1)
        await asyncio.sleep(1)
        supervisor.send(first)
        s.now.exit(1)
        await settle()
        assert [suspects for _, _, suspects in s.listener.losses] == [{first.id}, frozenset()]


@virtual_time
async def test_rows_are_owed_until_they_are_answered_or_dropped() -> None:
    async with supervised() as (supervisor, s):
        one, two, three = job(rows=1), job(rows=2), job(rows=4)
        for each in (one, two, three):
            supervisor.send(each)
        assert supervisor.rows_owed == 7
        supervisor.cancel(three.id)
        assert supervisor.rows_owed == 7
        s.now.say(Dropped(three.id))
        assert supervisor.rows_owed == 3
        s.now.say(Finished(two.id, (), Timings()))
        s.now.say(Failed(one.id, "internal", "", retryable=False))
        assert supervisor.rows_owed == 0


@virtual_time
async def test_a_job_is_cancelled_once_and_the_time_until_it_is_dropped_measured() -> None:
    async with supervised() as (supervisor, s):
        supervisor.send(held := job())
        supervisor.cancel("unknown")
        supervisor.cancel(held.id)
        supervisor.cancel(held.id)
        assert s.now.received == [held, Cancel(held.id)]
        await asyncio.sleep(2.5)
        s.now.say(Dropped(held.id))
        s.now.say(Dropped(held.id))
        assert s.figure("paella_cancel_duration_seconds_count") == 1
        assert s.figure("paella_cancel_duration_seconds_sum") == pytest.approx(2.5)


@virtual_time
async def test_messages_about_jobs_are_passed_on_in_their_order() -> None:
    async with supervised() as (_, s):
        messages: list[WorkerMessage] = [
            Running(("a",)),
            Preview("a", 0, 1, picture(0)),
            Drawn("a", picture(0)),
            Heartbeat((), 1, 0),
            Finished("a", (), Timings()),
            Failed("b", "internal", "", retryable=False),
        ]
        for message in (*messages, Dropped("c")):
            s.now.say(message)
        assert s.listener.messages == messages


@virtual_time
async def test_an_error_of_the_supervision_is_logged_and_no_worker_counts_as_starting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> Never:
        raise KeyError("job")

    async with supervised() as (supervisor, s):
        s.listener.on_worker_lost = fail  # type: ignore[method-assign]
        s.now.exit(1)
        await asyncio.sleep(100)
        reason = "worker supervision failed: KeyError('job')"
        status = supervisor.status
        assert (status.ready, status.reason, status.fatal) == (False, reason, reason)
    assert "worker supervision failed" in [record.msg for record in caplog.records]


# ── stopping ──────────────────────────────────────────────────────────────────────────────────────


@virtual_time
@pytest.mark.parametrize(("ready", "grace_s"), [(True, EXIT_GRACE_S), (False, 0)])
async def test_a_worker_that_reads_messages_is_given_time_to_stop_and_replaced_no_more(
    ready: bool, grace_s: float
) -> None:
    async with supervised(ready) as (supervisor, s):
        await supervisor.stop()
        assert s.now.grace_s == grace_s
        s.now.exit(0)
        await asyncio.sleep(100)
        assert len(s.processes) == 1
        assert s.listener.losses == []


@virtual_time
async def test_a_supervisor_that_was_never_started_can_be_stopped() -> None:
    setting = Setting()
    await Supervisor(fake_worker.main, Settings(), setting.metrics, setting.listener).stop()
    assert setting.processes == []


@virtual_time
async def test_no_process_at_the_start_is_an_error() -> None:
    setting = Setting()
    setting.refusals = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.supervisor.WorkerProcess", setting.process)
        with pytest.raises(OSError, match="no process"):
            await Supervisor(
                fake_worker.main, Settings(), setting.metrics, setting.listener
            ).start()
