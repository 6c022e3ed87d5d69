"""Which replica a job goes to, and how many replicas there should be."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import SamplingConfig
from server.engine.job import Job
from server.ray_serve.routing import Load, LoadMeter, WaitEstimator, replicas_for, work_units


def job(rows: int = 1, side: int = 256, steps: int = 12, patience_s: float = 60) -> Job:
    sampling = SamplingConfig(
        steps=steps,
        renoise_steps=0,
        guidance=(2.0, 2.0),
        guidance_steps=steps,
        temperature=(1.0, 1.0),
        sampler="multinomial",
        typical_mass=0.9,
    )
    return Job(
        "id",
        "tiny",
        "",
        "",
        side,
        side,
        tuple(range(rows)),
        sampling,
        time.monotonic() + patience_s,
    )


def test_a_job_costs_its_images_steps_pixels_and_branches() -> None:
    assert work_units(job()) == 1
    assert work_units(job(rows=3, side=128, steps=24)) == pytest.approx(3 * 2 / 4)


def test_jobs_that_come_together_are_shared_out_evenly() -> None:
    waits, taken = WaitEstimator("me"), {"a": 0, "b": 0, "c": 0}
    for number in range(30):
        first = waits.rank(list(taken), {}, job())[0]
        waits.assign(str(number), first, job())
        taken[first] += 1
    assert set(taken.values()) == {10}


def test_a_replica_twice_as_fast_gets_twice_as_much() -> None:
    waits, taken = WaitEstimator("me"), {"slow": 0, "fast": 0}
    loads = {"slow": Load(seconds_per_unit=2.0), "fast": Load(seconds_per_unit=1.0)}
    for number in range(30):
        first = waits.rank(list(taken), loads, job())[0]
        waits.assign(str(number), first, job())
        taken[first] += 1
    assert taken == {"slow": 10, "fast": 20}


def test_one_large_job_outweighs_many_small_ones() -> None:
    waits = WaitEstimator("me")
    waits.assign("large", "a", job(rows=16))
    for number in range(10):
        waits.assign(str(number), "b", job())
    assert waits.rank(["a", "b"], {}, job()) == ["b", "a"]


def test_what_others_sent_counts_and_what_it_sent_itself_counts_once() -> None:
    waits = WaitEstimator("me")
    waits.assign("mine", "a", job(rows=2))
    loads = {"a": Load(units={"me": 2.0}), "b": Load(units={"other": 3.0})}
    assert waits.rank(["a", "b"], loads, job()) == ["a", "b"]


def test_a_replica_whose_workers_are_away_comes_last() -> None:
    waits = WaitEstimator("me")
    waits.assign("job", "busy", job(rows=16))
    assert waits.rank(["away", "busy"], {"away": Load(ready=False)}, job()) == ["busy", "away"]


def test_a_completed_job_is_in_nobody_s_way_nor_is_one_whose_deadline_passed() -> None:
    waits = WaitEstimator("me")
    waits.assign("done", "a", job(rows=8))
    waits.assign("expired", "a", job(rows=8, patience_s=-1))
    waits.assign("running", "b", job())
    waits.complete("done", "a")
    assert waits.rank(["b", "a"], {}, job()) == ["a", "b"]


def test_a_job_that_was_sent_elsewhere_outlives_its_first_replica() -> None:
    waits = WaitEstimator("me")
    waits.assign("job", "a", job())
    waits.assign("job", "b", job())
    waits.complete("job", "a")
    assert waits.rank(["a", "b"], {}, job()) == ["a", "b"]


def test_a_meter_tells_what_is_unfinished_and_how_fast_it_goes() -> None:
    meter = LoadMeter()
    assert meter.load(ready=True) == Load()
    end = meter.begin("me", job(rows=4))
    meter.begin("you", job())
    assert meter.load(ready=True) == Load(units={"me": 4.0, "you": 1.0})
    end(True)
    load = meter.load(ready=False)
    assert (load.ready, dict(load.units)) == (False, {"you": 1.0})
    assert load.seconds_per_unit is not None
    assert load.seconds_per_unit >= 0


def test_a_sender_without_jobs_leaves_nothing_behind() -> None:
    meter = LoadMeter()
    for sender in ("a", "b"):
        ends = [meter.begin(sender, job(side=side)) for side in (64, 96, 192)]
        for end in ends:
            end(False)
    assert meter.load(ready=True).units == {}


@given(st.integers(0, 1_000_000), st.floats(0.5, 100))
def test_so_many_replicas_that_none_has_too_many_rows_and_none_is_spare(
    rows: int, target: float
) -> None:
    count = replicas_for(rows, target)
    assert rows <= count * target * (1 + 1e-9)
    assert count == 0 or rows > (count - 1) * target * (1 - 1e-9)
