"""Rows get slots in order of arrival, pools take turns, and every row steps until it is finished
or forgotten.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model.config import SamplingConfig
from server.engine.job import Job
from server.engine.scheduler import STARTS, RowId, Scheduler

SAMPLING = SamplingConfig(
    steps=1,
    renoise_steps=0,
    guidance=(1.0, 1.0),
    guidance_steps=0,
    temperature=(1.0, 1.0),
    sampler="argmax",
    typical_mass=0.2,
)


def job(
    id: str, rows: int = 1, width: int = 64, model: str = "tiny", deadline: float = 100.0
) -> Job:
    return Job(id, model, "", "", width, 64, tuple(range(rows)), SAMPLING, deadline)


def scheduler(max_rows: int, *jobs: Job) -> Scheduler:
    made = Scheduler(max_rows)
    for each in jobs:
        made.add(each)
    return made


def rows(id: str, *indices: int) -> list[RowId]:
    return [RowId(id, i) for i in indices]


def test_rows_are_admitted_in_order_of_arrival_up_to_the_slots_there_are():
    s = scheduler(3, job("a", 2), job("b", 3))
    assert s.admit() == rows("a", 0, 1) + rows("b", 0)
    assert s.admit() == []
    assert (s.rows_running, s.rows_waiting) == (3, 2)


def test_a_freed_slot_goes_to_the_next_row():
    s = scheduler(2, job("a", 3))
    s.admit()
    s.finish(RowId("a", 0))
    assert s.admit() == rows("a", 2)


def test_while_others_run_only_so_many_rows_are_started_between_two_steps():
    s = scheduler(4 * STARTS, job("a", STARTS + 1), job("b", 2 * STARTS))
    assert len(s.admit()) == 3 * STARTS + 1, "nobody waits for these"
    s.add(job("c", STARTS))
    assert s.admit() == rows("c", *range(STARTS - 1))
    s.remove("b")
    s.add(job("d", 2 * STARTS))
    assert s.admit() == rows("c", STARTS - 1) + rows("d", *range(STARTS - 1))


def test_rows_that_are_finished_and_not_decoded_take_slots():
    s = scheduler(4, job("a", 3))
    assert s.admit(finished=2) == rows("a", 0, 1)
    assert s.admit(finished=2) == []
    assert s.admit(finished=1) == rows("a", 2)


def test_rows_of_one_size_and_model_step_together():
    s = scheduler(9, job("a", 2), job("b", 1))
    s.admit()
    assert s.next_rows() == rows("a", 0, 1) + rows("b", 0)


@pytest.mark.parametrize("other", [{"width": 128}, {"model": "huge"}])
def test_rows_of_another_size_or_model_step_apart_and_pools_take_turns(other):
    s = scheduler(9, job("a"), job("b", **other), job("c"))
    s.admit()
    turns = [s.next_rows() for _ in range(4)]
    assert turns == [rows("a", 0) + rows("c", 0), rows("b", 0)] * 2


def test_no_pool_starves_while_another_is_refilled():
    s = scheduler(4, job("large", width=512))
    s.admit()
    stepped: Counter[int] = Counter()
    for i in range(20):
        s.add(job(f"small{i}"))
        s.admit()
        turn = s.next_rows()
        stepped[s.job(turn[0].job).width] += 1
        for row in turn:
            if row.job.startswith("small"):
                s.remove(row.job)
    assert stepped[512] == 10


def test_a_row_that_joins_steps_at_its_pool_s_next_turn():
    s = scheduler(9, job("a"))
    s.admit()
    s.next_rows()
    s.add(job("b"))
    s.admit()
    assert s.next_rows() == rows("a", 0) + rows("b", 0)


def test_nothing_running_is_nothing_to_step():
    s = scheduler(2)
    assert s.idle
    assert s.next_rows() == []
    s.add(job("a"))
    assert not s.idle
    assert s.next_rows() == []


def test_a_removed_job_gives_back_its_running_rows_and_frees_their_slots():
    s = scheduler(2, job("a", 3), job("b", 1))
    s.admit()
    assert s.remove("a") == rows("a", 0, 1)
    assert s.rows_waiting == 1
    assert s.admit() == rows("b", 0)
    assert s.next_rows() == rows("b", 0)


def test_removing_what_is_unknown_or_gone_already_is_no_error():
    s = scheduler(2, job("a"))
    assert s.remove("never") == []
    s.remove("a")
    assert s.remove("a") == []
    assert s.idle


def test_a_job_is_forgotten_only_when_it_is_removed():
    s = scheduler(2, job("a"))
    s.admit()
    s.finish(RowId("a", 0))
    assert not s.idle
    s.remove("a")
    assert s.idle


def test_jobs_expire_at_their_deadline_whether_running_or_waiting():
    s = scheduler(
        1, job("running", deadline=5.0), job("waiting", deadline=4.0), job("later", deadline=9.0)
    )
    s.admit()
    assert s.expired(3.9) == []
    assert s.expired(5.0) == ["running", "waiting"]


@pytest.mark.process
def test_the_scheduler_imports_no_torch():
    code = "import sys, server.engine.scheduler; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


class AnyOrder(RuleBasedStateMachine):
    """Whatever is asked of it in whatever order, it agrees with a list of rows and a set of
    running ones.
    """

    MAX_ROWS = 4

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.MAX_ROWS)
        self.jobs: dict[str, Job] = {}
        self.waiting: list[RowId] = []
        self.running: set[RowId] = set()
        self.added = 0

    @rule(count=st.integers(1, 6), width=st.sampled_from([64, 128, 256]))
    def add(self, count: int, width: int) -> None:
        new = job(f"job{self.added}", count, width)
        self.added += 1
        self.jobs[new.id] = new
        self.waiting += rows(new.id, *range(count))
        self.scheduler.add(new)

    @rule()
    def admit(self) -> None:
        free = self.MAX_ROWS - len(self.running)
        expected, self.waiting = self.waiting[:free], self.waiting[free:]
        self.running |= set(expected)
        assert self.scheduler.admit() == expected

    @rule()
    def step(self) -> None:
        turn = self.scheduler.next_rows()
        assert len(turn) == len(set(turn))
        assert set(turn) <= self.running
        assert bool(turn) == bool(self.running)
        widths = {self.jobs[row.job].width for row in turn}
        assert len(widths) <= 1
        assert {row for row in self.running if self.jobs[row.job].width in widths} == set(turn)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            row = data.draw(st.sampled_from(sorted(self.running, key=str)))
            self.running.remove(row)
            self.scheduler.finish(row)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from([*self.jobs, "unknown"]))
        gone = {row for row in self.running if row.job == id}
        self.running -= gone
        self.waiting = [row for row in self.waiting if row.job != id]
        self.jobs.pop(id, None)
        assert set(self.scheduler.remove(id)) == gone

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.rows_running == len(self.running) <= self.MAX_ROWS
        assert self.scheduler.rows_waiting == len(self.waiting)
        assert self.scheduler.idle == (not self.jobs)


TestAnyOrder = AnyOrder.TestCase
