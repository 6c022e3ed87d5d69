"""The worker's loop over a real pipe: a job comes back drawn, cancelled, expired or failed, and
the loop goes on.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from load_tests.processes import resident_mib
from server.engine import decode_queue, worker
from server.engine.cpu_threads import SharedThreads
from server.engine.messages import (
    Cancel,
    Count,
    Crashed,
    Drawn,
    Dropped,
    Failed,
    Finished,
    FromWorker,
    Heartbeat,
    Ready,
    Running,
    ShareCPU,
    Step,
    Stop,
    Timings,
    receive_message,
    send_message,
)
from server.engine.runner import Stopwatch
from server.engine.worker import Worker
from tests.support.workers import (
    PATIENCE_S,
    SAMPLING,
    Far,
    Gate,
    LateMark,
    far_fixture,  # noqa: F401, fixtures
    job,
    shown,
)

# ── a job's way ───────────────────────────────────────────────────────────────────────────────────


def test_a_job_comes_back_as_the_pictures_the_pipeline_draws(far, pipeline):
    far.send(job("a", seeds=(3, 4)))
    answer = far.answer("a")
    assert isinstance(answer, Finished)
    expected = pipeline.generate(["red apple"] * 2, [3, 4], SAMPLING).numpy()
    for image in answer.images:
        assert (image.width, image.height) == (32, 32)
        pixels = np.frombuffer(image.pixels, np.uint8).reshape(32, 32, 3)
        assert np.mean(pixels == expected[image.index]) >= 0.99
    assert sorted(image.index for image in answer.images) == [0, 1]


def test_width_and_height_are_not_confused(far):
    far.send(job("a", width=48, height=16))
    answer = far.answer("a")
    assert isinstance(answer, Finished)
    assert [(i.width, i.height, len(i.pixels)) for i in answer.images] == [(48, 16, 48 * 16 * 3)]


def test_stages_are_timed_and_add_up_to_no_more_than_the_wait(far):
    began = time.perf_counter()
    far.send(job("a"))
    answer = far.answer("a")
    assert isinstance(answer, Finished)
    t = answer.timings
    stages = [t.queue, t.encode, t.prior, t.denoise, t.decode]
    assert all(stage >= 0 for stage in stages)
    assert t.denoise > 0
    assert sum(stages) <= time.perf_counter() - began


def test_a_job_s_seconds_are_those_of_its_stages_and_of_its_wait_for_a_slot(far, monkeypatch):
    """As if rows started in 3 s, stepped in 10 s and were decoded in 100 s."""
    clock = SimpleNamespace(now=1000.0)
    start, step, decode = far.runner.start, far.runner.step, far.runner.decode

    def started(parts, watch):
        truncated = start(parts, Stopwatch())
        clock.now += 3
        watch.count("encode", 1.0)
        watch.count("prior", 2.0)
        return truncated

    def stepped(model, rows):
        clock.now += 10
        return step(model, rows)

    def decoded(model, rows):
        clock.now += 100
        return decode(model, rows)

    for name, function in (("start", started), ("step", stepped), ("decode", decoded)):
        monkeypatch.setattr(far.runner, name, function)
    ticking = SimpleNamespace(
        perf_counter=lambda: clock.now, monotonic=time.monotonic, process_time=time.process_time
    )
    for module in (worker, decode_queue):
        monkeypatch.setattr(module, "time", ticking)
    gate, two = Gate(far, monkeypatch), replace(SAMPLING, steps=2, renoise_steps=1)
    far.send(job("first", seeds=(0, 1, 2, 3), sampling=two))
    gate.wait()
    # It arrives after the first one's first step, and waits for its slots.
    far.send(job("second", sampling=two, traceparent="00-1-2-01"))
    gate.opened.set()
    first, second = far.answer("first"), far.answer("second")
    assert isinstance(first, Finished)
    assert isinstance(second, Finished)
    assert first.timings == Timings(queue=0, encode=1, prior=2, denoise=2 * 10, decode=100)
    assert second.timings == replace(first.timings, queue=10 + 100)
    assert second.step_seconds == (3 + 10, 3 + 2 * 10)


def test_a_traced_job_s_answer_tells_when_each_step_ended(far):
    far.send(job("a", seeds=(3, 4), traceparent="00-1-2-01"))
    answer = far.answer("a")
    assert isinstance(answer, Finished)
    ends, t = answer.step_seconds, answer.timings
    assert len(ends) == SAMPLING.steps
    assert list(ends) == sorted(ends)
    assert t.encode + t.prior <= ends[0]
    assert ends[-1] <= t.encode + t.prior + t.denoise
    far.send(job("b"))
    untraced = far.answer("b")
    assert isinstance(untraced, Finished)
    assert untraced.step_seconds == ()


@pytest.mark.parametrize(
    ("prompt", "truncated"), [("red apple", ()), ("the red apple " * 20, ("byt5", "clip"))]
)
def test_cut_prompts_are_reported(far, prompt, truncated):
    far.send(job("a", prompt))
    answer = far.answer("a")
    assert isinstance(answer, Finished)
    assert answer.truncated == truncated


def test_more_rows_than_slots_are_all_drawn(far):
    far.send(job("many", seeds=tuple(range(9))))
    answer = far.answer("many")
    assert isinstance(answer, Finished)
    assert sorted(image.index for image in answer.images) == list(range(9))


def test_images_of_an_early_job_are_sent_as_they_are_done_and_again_with_its_answer(far):
    def said() -> tuple[list[FromWorker], Finished]:
        messages = list[FromWorker]()
        while not isinstance(
            message := far.receive(lambda m: not isinstance(m, Running | Heartbeat)), Finished
        ):
            messages.append(message)
        return messages, message

    far.send(job("plain", seeds=(0, 1)))
    assert said()[0] == []
    far.send(job("early", "the red apple " * 20, seeds=tuple(range(6)), early=True))
    drawn, answer = said()
    assert drawn == [Drawn("early", image, ("byt5", "clip")) for image in answer.images]
    assert sorted(image.index for image in answer.images) == list(range(6))


def test_a_seed_s_picture_is_the_same_in_company(far):
    far.send(job("alone", seeds=(7,)))
    alone = far.answer("alone")
    for i in range(3):
        far.send(
            job(
                f"neighbour{i}",
                prompt="the " * i,
                seeds=(i, i + 10),
                sampling=replace(SAMPLING, steps=2 + i),
            )
        )
    far.send(job("again", seeds=(7,)))
    again = far.answer("again")
    assert isinstance(alone, Finished)
    assert isinstance(again, Finished)
    one, other = (np.frombuffer(answer.images[0].pixels, np.uint8) for answer in (alone, again))
    # One token in sixty-four may fall to the other side of a rounding, and shows in its
    # surroundings.
    assert np.mean(one == other) >= 0.9


def test_steps_are_reported_in_beats(far, monkeypatch):
    monkeypatch.setattr(worker, "_HEARTBEAT_S", 0.0)
    began = time.perf_counter()
    far.send(job("a", seeds=(0, 1), sampling=replace(SAMPLING, guidance_steps=1)))
    steps: list[Step] = []
    while len(steps) < SAMPLING.steps:
        beat = far.receive(lambda m: isinstance(m, Heartbeat))
        assert isinstance(beat, Heartbeat)
        steps += beat.steps
    assert [(step.rows, step.pixels) for step in steps] == [(2, 32 * 32)] * SAMPLING.steps
    assert [step.branches for step in steps] == [4, 2, 2, 2]
    assert all(step.seconds > 0 for step in steps)
    assert sum(step.seconds for step in steps) <= time.perf_counter() - began


def test_counts_of_the_prompt_cache_are_reported_once(far, monkeypatch):
    monkeypatch.setattr(worker, "_HEARTBEAT_S", 0.0)
    reported: Counter[Count] = Counter()

    def count(message: FromWorker) -> bool:
        if isinstance(message, Heartbeat):
            reported.update(message.counts)
        return isinstance(message, Finished)

    for id in ("a", "b"):
        far.send(job(id, prompt="a red apple"))
        far.receive(count)
    # The next one follows the decoding.
    last = far.receive(lambda m: isinstance(m, Heartbeat))
    assert isinstance(last, Heartbeat)
    reported.update(last.counts)
    assert reported["prompt_cache_hits", "text"] > 0
    assert reported == far.runner.counters


def test_a_worker_waits_for_messages_only_while_it_has_no_job(runner, monkeypatch):
    near, connection = Pipe()
    loop, poll = Worker(near, runner, max_rows=4, idle_heartbeat_s=2.5), near.poll
    waits = set[tuple[float, bool]]()

    def watched(timeout: float) -> bool:
        waits.add((timeout, loop.scheduler.idle))
        return poll(timeout)

    monkeypatch.setattr(near, "poll", watched)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    far = Far(connection, runner, thread)
    far.send(job("a"))
    assert isinstance(far.answer("a"), Finished)
    far.stop()
    near.close()
    connection.close()
    assert waits == {(2.5, True), (0, False)}


def test_an_idle_worker_still_beats(far):
    beat = far.receive(lambda m: isinstance(m, Heartbeat))
    assert isinstance(beat, Heartbeat)
    assert (beat.steps, beat.rows_running, beat.rows_waiting) == ((), 0, 0)


def test_a_worker_at_work_waits_with_its_beat_and_an_idle_one_beats_at_once(far, monkeypatch):
    monkeypatch.setattr(worker, "_HEARTBEAT_S", math.inf)
    far.send(job("a"))
    while not isinstance(
        message := far.receive(lambda m: isinstance(m, Heartbeat | Finished)), Finished
    ):
        assert isinstance(message, Heartbeat)
        assert message.steps == (), "it was idle before the job"
    beat = far.receive(lambda m: isinstance(m, Heartbeat))
    assert isinstance(beat, Heartbeat)
    assert len(beat.steps) == SAMPLING.steps


def test_beats_say_how_many_steps_begun_jobs_have_left(far, monkeypatch):
    monkeypatch.setattr(worker, "_HEARTBEAT_S", 0.0)
    far.send(job("a", seeds=(0, 1)))
    left: list[int] = []
    while not isinstance(
        message := far.receive(lambda m: isinstance(m, Heartbeat | Finished)), Finished
    ):
        assert isinstance(message, Heartbeat)
        left += message.left.values()
    assert left == [6, 4, 2]


# ── previews ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("asked", "steps"), [(0, 4), (1, 4), (3, 4), (8, 4), (8, 1)])
def test_previews_come_in_order_evenly_spaced_and_no_more_than_asked(far, asked, steps):
    far.send(
        job(
            "a",
            seeds=(0, 1),
            previews=asked,
            sampling=replace(SAMPLING, steps=steps, renoise_steps=0),
        )
    )
    previews, answer = shown(far, "a")
    for image in answer.images:
        own = [
            (preview.number, preview.step)
            for preview in previews
            if preview.image.index == image.index
        ]
        assert own == list(
            enumerate({0: [], 1: [2], 3: [1, 2, 3], 8: [1, 2, 3] if steps == 4 else []}[asked])
        )


def test_a_preview_is_what_its_step_drew_and_changes_nobody_s_picture(far, pipeline):
    far.send(job("plain", seeds=(7,)))
    far.send(job("neighbour", seeds=(8,), sampling=replace(SAMPLING, steps=6)))
    plain, neighbour = far.answer("plain"), far.answer("neighbour")
    far.send(job("shown", seeds=(7,), previews=3))
    far.send(job("again", seeds=(8,), sampling=replace(SAMPLING, steps=6)))
    previews, answer = shown(far, "shown")
    assert [preview.step for preview in previews] == [1, 2, 3]
    assert len({bytes(preview.image.pixels) for preview in previews}) == 3
    for one, other in ((plain, answer), (neighbour, far.answer("again"))):
        pixels = [np.frombuffer(each.images[0].pixels, np.uint8) for each in (one, other)]
        assert np.mean(pixels[0] == pixels[1]) >= 0.9


# ── its ends ──────────────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_job_stops_at_the_next_step_and_no_picture_is_answered(far, monkeypatch):
    gate = Gate(far, monkeypatch)
    far.send(job("doomed", seeds=(0, 1), sampling=replace(SAMPLING, steps=64)))
    gate.wait()
    far.send(Cancel("doomed"))
    far.send(job("other"))
    gate.opened.set()
    assert far.receive(lambda m: isinstance(m, Dropped | Finished | Failed)) == Dropped("doomed")
    first = far.receive(lambda m: isinstance(m, Finished | Failed))
    assert isinstance(first, Finished)
    assert first.id == "other"
    assert far.receive(
        lambda m: isinstance(m, Heartbeat) and not m.steps and not m.rows_running + m.rows_waiting
    )
    assert far.runner.rows == {}


def test_cancelling_a_waiting_an_unknown_or_a_finished_job_disturbs_nothing(far):
    for id in ("unknown", "a", "a"):
        far.send(Cancel(id))
    far.send(job("a"))
    assert isinstance(far.answer("a"), Finished)
    far.send(Cancel("a"))
    far.send(job("b"))
    assert isinstance(far.answer("b"), Finished)


def test_a_job_that_is_late_already_is_never_started(far, monkeypatch):
    def start(*_):
        raise AssertionError("started")

    monkeypatch.setattr(far.runner, "start", start)
    far.send(job("late", deadline=time.monotonic() - 1))
    assert far.answer("late") == Failed("late", "deadline", "the deadline passed", retryable=True)


def test_a_job_whose_deadline_passes_on_the_way_is_dropped(far, monkeypatch):
    gate, clock = Gate(far, monkeypatch), time.monotonic
    far.send(job("patient", deadline=math.inf))
    gate.wait()
    far.send(job("waiting", deadline=clock() + 3600))
    far.send(job("in time", deadline=clock() + 3 * 3600))
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 2 * 3600)
    gate.opened.set()
    assert far.answer("waiting") == Failed(
        "waiting", "deadline", "the deadline passed", retryable=True
    )
    assert isinstance(far.answer("patient"), Finished)
    assert isinstance(far.answer("in time"), Finished)


@pytest.mark.parametrize("stage", ["start", "step", "decode"])
@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (RuntimeError("/secret/path is broken"), "internal", False),
        (torch.OutOfMemoryError("tried to allocate"), "out_of_memory", True),
        (MemoryError(), "out_of_memory", True),
    ],
)
def test_a_stage_that_raises_fails_its_job_and_the_next_one_is_done(
    far, monkeypatch, caplog, stage, error, code, retryable
):
    def broken(*_):
        raise error

    with monkeypatch.context() as patched, caplog.at_level(logging.CRITICAL, logger="server"):
        patched.setattr(far.runner, stage, broken)
        far.send(job("a", seeds=(0, 1)))
        answer = far.answer("a")
    assert isinstance(answer, Failed)
    assert (answer.code, answer.retryable) == (code, retryable)
    assert "secret" not in answer.message
    far.send(job("b"))
    assert isinstance(far.answer("b"), Finished)
    assert far.runner.rows == {}


def test_a_job_that_fails_to_start_does_not_take_its_neighbours_with_it(far, monkeypatch, caplog):
    start = far.runner.start

    def picky(parts, watch):
        if any(job.prompt == "poison" for job, _ in parts):
            raise RuntimeError("poison")
        return start(parts, watch)

    monkeypatch.setattr(far.runner, "start", picky)
    gate = Gate(far, monkeypatch)
    with caplog.at_level(logging.CRITICAL, logger="server"):
        far.send(job("first"))
        gate.wait()
        far.send(job("poisoned", "poison"))
        far.send(job("second"))
        gate.opened.set()
        assert isinstance(far.answer("poisoned"), Failed)
        assert isinstance(far.answer("first"), Finished)
        assert isinstance(far.answer("second"), Finished)


@pytest.mark.parametrize("stage", ["step", "decode"])
@pytest.mark.parametrize(
    "error", [RuntimeError("poison"), torch.OutOfMemoryError("tried to allocate")]
)
def test_of_rows_that_share_a_stage_only_those_that_raise_alone_fail(
    far, monkeypatch, caplog, stage, error
):
    original = getattr(far.runner, stage)
    together: list[int] = []

    def picky(model, rows):
        together.append(len(rows))
        if any(row.job == "poisoned" for row in rows):
            raise error
        return original(model, rows)

    far.send(job("alone", seeds=(5,)))
    alone = far.answer("alone")
    monkeypatch.setattr(far.runner, stage, picky)
    gate = Gate(far, monkeypatch)
    with caplog.at_level(logging.CRITICAL, logger="server"):
        far.send(job("blocker", sampling=replace(SAMPLING, steps=1), width=16))
        gate.wait()
        for id in ("first", "poisoned", "last"):
            far.send(job(id, seeds=(5,)))
        gate.opened.set()
        assert isinstance(far.answer("poisoned"), Failed)
        first, last = far.answer("first"), far.answer("last")
    assert max(together) == 3, "they did share the stage"
    for answer in (first, last):
        assert isinstance(answer, Finished)
        assert isinstance(alone, Finished)
        same = [np.frombuffer(a.images[0].pixels, np.uint8) for a in (answer, alone)]
        assert np.mean(same[0] == same[1]) >= 0.9
    assert far.runner.rows == {}


def test_the_jobs_of_a_stage_are_announced_before_it_begins_and_only_when_they_change(
    far, monkeypatch
):
    gate = Gate(far, monkeypatch)
    far.send(job("a"))
    gate.wait()
    assert far.receive(lambda m: isinstance(m, Running | Finished)) == Running(("a",))
    far.send(job("b"))
    gate.opened.set()
    said = []
    while not isinstance(
        message := far.receive(lambda m: isinstance(m, Running | Finished)), Finished
    ):
        said.append(message)
    assert Running(("a", "b")) in said
    assert all(one != other for one, other in itertools.pairwise(said))


def test_suspects_share_no_batch_as_they_start(far, monkeypatch):
    batches, start = list[set[str]](), far.runner.start
    monkeypatch.setattr(
        far.runner,
        "start",
        lambda parts, watch: batches.append({job.id for job, _ in parts}) or start(parts, watch),
    )
    gate = Gate(far, monkeypatch)
    far.send(job("first"))
    gate.wait()
    for id in ("suspect", "one", "other"):
        far.send(job(id, alone="suspect" in id))
    gate.opened.set()
    for _ in range(4):
        assert isinstance(far.receive(lambda m: isinstance(m, Finished | Failed)), Finished)
    assert sorted(batches, key=sorted) == [{"first"}, {"one", "other"}, {"suspect"}]


def test_a_worker_computes_with_its_share_of_the_threads(far, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(far.runner, "threads", SharedThreads(4, used.append))
    far.send(ShareCPU(2))
    far.send(job("a"))
    assert isinstance(far.answer("a"), Finished)
    assert used[0] == 2
    assert 4 not in used


def test_jobs_that_are_being_decoded_are_announced_with_those_of_the_stage_beside_them(
    far, monkeypatch
):
    mark, decode = LateMark(), far.runner.decode
    monkeypatch.setattr(
        far.runner, "decode", lambda model, rows: replace(decode(model, rows), mark=mark)
    )
    gate = Gate(far, monkeypatch)
    far.send(job("long", width=16, sampling=replace(SAMPLING, steps=64)))
    gate.wait()
    far.send(
        job("short", sampling=replace(SAMPLING, steps=1))
    )  # no stage of theirs is shared: they differ in size
    gate.opened.set()
    assert far.receive(lambda m: isinstance(m, Running) and len(m.jobs) == 2) == Running(
        ("long", "short")
    )
    mark.passed = True
    assert isinstance(far.answer("short"), Finished)
    assert isinstance(far.answer("long"), Finished)


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", {"interactive"}), ("cuda", {"interactive", "batch"})]
)
def test_batch_rows_let_interactive_ones_step_without_them_on_a_cpu_only(device, expected):
    near, connection = Pipe()
    scheduler = Worker(near, SimpleNamespace(device=torch.device(device)), max_rows=4).scheduler
    scheduler.add(job("batch", priority="batch"))
    scheduler.add(job("interactive"))
    scheduler.admit()
    assert {row.job for row in scheduler.next_rows()} == expected
    near.close()
    connection.close()


def test_a_failed_device_ends_the_worker_because_it_can_compute_nothing_any_more(
    runner, monkeypatch, caplog
):
    def broken(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "step", broken)
    near, connection = Pipe()
    send_message(connection, job("a"))
    with pytest.raises(torch.AcceleratorError):
        Worker(near, runner, max_rows=4).run()
    runner.drop(list(runner.rows))
    near.close()
    connection.close()


def test_an_unknown_model_fails_and_stops_nobody(far, caplog):
    with caplog.at_level(logging.CRITICAL, logger="server"):
        far.send(job("a", model="huge"))
        answer = far.answer("a")
    assert isinstance(answer, Failed)
    assert not answer.retryable


def test_stop_ends_the_loop_with_work_unfinished(runner, monkeypatch):
    near, connection = Pipe()
    thread = threading.Thread(target=Worker(near, runner, max_rows=4).run)
    thread.start()
    far = Far(connection, runner, thread)
    gate = Gate(far, monkeypatch)
    far.send(job("a", sampling=replace(SAMPLING, steps=64)))
    gate.wait()
    far.send(Stop())
    gate.opened.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    runner.drop(list(runner.rows))


@pytest.fixture
def own_logger() -> Iterator[None]:
    """A worker process configures the package's logger; here it is everybody's."""
    logger = logging.getLogger("server")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_the_process_is_ready_when_warm_and_ends_when_the_api_process_is_gone(
    random_settings, own_logger
):
    near, connection = Pipe()
    # All of this process computes with the threads that a worker chooses; this one chooses none.
    settings = random_settings.model_copy(update={"threads": torch.get_num_threads()})
    thread = threading.Thread(target=worker.main, args=(near, settings))
    thread.start()
    assert connection.poll(PATIENCE_S)
    assert receive_message(connection) == Ready("cpu", "float32", torch.get_num_threads())
    send_message(connection, job("a"))
    connection.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    near.close()


@pytest.mark.parametrize(("stall_s", "idle_s"), [(2.0, 0.5), (4.0, 1.0), (60.0, 1.0)])
def test_an_idle_worker_beats_every_second_and_several_times_within_the_stall_timeout(
    runner, random_settings, monkeypatch, stall_s, idle_s
):
    near, connection = Pipe()
    waits, poll = list[float](), near.poll
    monkeypatch.setattr(near, "poll", lambda timeout: waits.append(timeout) or poll(timeout))
    for stage in ("warm_up", "choose_threads"):
        monkeypatch.setattr(runner, stage, lambda: None)
    changes = {"threads": torch.get_num_threads(), "stall_timeout_s": stall_s}
    send_message(connection, Stop())
    worker.main(near, random_settings.model_copy(update=changes), lambda _: runner)
    assert receive_message(connection) == Ready("cpu", "float32", torch.get_num_threads())
    assert waits == [idle_s]
    near.close()
    connection.close()


def test_a_failed_device_is_told_and_ends_the_process_whether_anybody_listens_or_not(
    random_settings, monkeypatch
):
    def lost(_):
        raise torch.AcceleratorError("CUDA error: lost")

    codes = list[int]()
    monkeypatch.setattr("server.engine.worker.os._exit", codes.append)
    settings = random_settings.model_copy(update={"threads": torch.get_num_threads()})
    near, connection = Pipe()
    worker.main(near, settings, lost)
    assert receive_message(connection) == Crashed(
        "the device failed: AcceleratorError: CUDA error: lost", lasting=False
    )
    connection.close()
    worker.main(near, settings, lost)
    assert codes == [70, 70]
    near.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_s_memory_threads_and_time_are_those_of_its_process(monkeypatch):
    began = time.process_time()
    stats = worker.process_stats(torch.device("cpu"))
    assert began <= stats.cpu_seconds <= time.process_time()
    assert (stats.threads, stats.device_bytes) == (torch.get_num_threads(), {})
    now, most = (resident_mib(os.getpid(), peak=peak) for peak in (False, True))
    assert stats.resident_bytes / 2**20 == pytest.approx(now, rel=0.1)

    def resident(platform: str) -> int:
        with monkeypatch.context() as patched:
            patched.setattr("server.memory._STATM", Path("/nowhere"))
            patched.setattr("server.memory.sys.platform", platform)
            return worker.process_stats(torch.device("cpu")).resident_bytes

    # Without /proc it is the most that it ever was, which macOS tells in bytes, others in KiB.
    assert resident("freebsd14") / 2**20 >= 0.9 * most
    assert resident("freebsd14") == pytest.approx(1024 * resident("darwin"), rel=0.1)
