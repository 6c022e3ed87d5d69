"""Who steps when, in simulated time: turns by deadline, bounded waits, priorities, and pools of
one's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.messages import Job
from server.engine.scheduler import (
    BATCH_TURN,
    INTERACTIVE_SHARE,
    LENGTHS,
    PATIENCE,
    Pool,
    RowId,
    Scheduler,
)
from tests.test_scheduler import SAMPLING, job, rows, scheduler


class Machine:
    """A runner without tensors: a step costs what `cost` says of its rows, and time is the sum
    of the steps.
    """

    def __init__(
        self, scheduler: Scheduler, cost: Callable[[Sequence[RowId]], float] = lambda _: 1.0
    ) -> None:
        self.scheduler, self.cost = scheduler, cost
        self.now = 0.0
        self.turns: list[list[RowId]] = []
        self.steps: Counter[RowId] = Counter()
        self.finished_at: dict[RowId, float] = {}

    def step(self) -> list[RowId]:
        self.scheduler.admit()
        turn = self.scheduler.next_rows()
        self.turns.append(turn)
        self.now += self.cost(turn)
        for row in turn:
            self.steps[row] += 1
            if self.steps[row] == self.scheduler.job(row.job).sampling.steps:
                self.scheduler.finish(row)
                self.finished_at[row] = self.now
        return turn

    def run(self) -> None:
        while self.scheduler.rows_running or self.scheduler.rows_waiting:
            self.step()


def long(id: str, steps: int = 12, **changes: object) -> Job:
    return replace(job(id), sampling=replace(SAMPLING, steps=steps), **changes)


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_pool_with_the_earliest_deadline_steps_first():
    s = scheduler(9, long("late", width=128, deadline=50.0), long("early", deadline=20.0))
    machine = Machine(s)
    assert [machine.step()[0].job for _ in range(PATIENCE)] == ["early"] * PATIENCE


def test_a_pool_of_late_deadline_waits_for_a_bounded_number_of_steps():
    s = scheduler(
        9, long("late", width=128, deadline=50.0), long("early", deadline=20.0, steps=100)
    )
    machine = Machine(s)
    turns = "".join(machine.step()[0].job[0] for _ in range(12))
    assert turns == ("e" * PATIENCE + "l") * 3


@given(
    pools=st.lists(
        st.tuples(st.integers(1, 40), st.floats(0, 100), st.sampled_from(["interactive", "batch"])),
        min_size=1,
        max_size=8,
    ),
)
def test_no_pool_waits_longer_than_the_bound_whatever_the_deadlines(pools):
    s = Scheduler(16)
    for i, (steps, deadline, priority) in enumerate(pools):
        s.add(long(f"{i}", steps, width=64 * (i + 1), deadline=deadline, priority=priority))
    machine = Machine(s)
    machine.run()
    waited: Counter[str] = Counter()
    unfinished = {f"{i}": steps for i, (steps, _, _) in enumerate(pools)}
    for turn in machine.turns:
        stepped = turn[0].job
        unfinished[stepped] -= 1
        waited[stepped] = 0
        for id, left in unfinished.items():
            if id != stepped and left:
                # Pools whose patience ends together go one after the other.
                waited[id] += 1
                assert waited[id] <= PATIENCE + len(pools)
    assert not any(unfinished.values())


def test_small_pictures_are_not_held_up_by_a_large_one():
    cost = {64: 1.0, 512: 10.0}
    s = scheduler(4, long("large", 64, width=512, deadline=300.0))
    machine = Machine(s, lambda turn: cost[s.job(turn[0].job).width])
    machine.step()
    s.add(long("small", 8, deadline=100.0))
    machine.run()
    # Its own eight steps, and no more than one of the large one's for every three of them.
    assert machine.finished_at[RowId("small", 0)] <= 10 + 8 * 1.0 + 3 * 10


def test_pools_equal_in_everything_take_turns():
    s = scheduler(9, *(long(id, width=64 * (i + 1)) for i, id in enumerate("abc")))
    machine = Machine(s)
    assert "".join(machine.step()[0].job for _ in range(9)) == "abc" * 3


def test_rows_of_one_request_may_run_in_different_steps():
    s = scheduler(2, replace(long("a", 3), seeds=(0, 1, 2)))
    machine = Machine(s)
    machine.run()
    assert machine.turns == [rows("a", 0, 1)] * 3 + [rows("a", 2)] * 3


# ── slots ─────────────────────────────────────────────────────────────────────────────────────────


def test_waiting_rows_are_admitted_by_deadline_then_arrival():
    s = scheduler(
        1,
        job("running"),
        job("second", deadline=40.0),
        job("third", deadline=40.0),
        job("first", deadline=30.0),
    )
    machine = Machine(s)
    machine.run()
    assert [turn[0].job for turn in machine.turns] == ["first", "second", "third", "running"]


def test_a_freed_slot_is_filled_before_the_very_next_step():
    s = scheduler(2, long("short", 1), long("other", 4), long("next", 2, deadline=200.0))
    machine = Machine(s)
    machine.run()
    assert [len(turn) for turn in machine.turns] == [2, 2, 2, 1]


def test_interactive_rows_are_admitted_before_batch_rows():
    s = scheduler(
        1, replace(job("batch", deadline=1.0), priority="batch"), job("interactive", deadline=90.0)
    )
    assert s.admit() == rows("interactive", 0)


def test_batch_rows_get_a_slot_in_so_many_under_endless_interactive_load():
    s = scheduler(1, replace(job("batch", deadline=1000.0), priority="batch"))
    machine = Machine(s)
    for i in range(BATCH_TURN):
        s.add(job(f"interactive{i}", deadline=float(i)))
        machine.step()
    assert [turn[0].job for turn in machine.turns].index("batch") == BATCH_TURN - 1


def test_batch_rows_leave_slots_to_interactive_ones():
    s = scheduler(8, replace(job("batch", 20), priority="batch"))
    assert len(s.admit()) == 8 - 8 // INTERACTIVE_SHARE
    s.add(job("interactive", 2, deadline=1000.0))
    assert s.admit() == rows("interactive", 0, 1)


def test_a_single_slot_is_open_to_batch_rows():
    s = scheduler(1, replace(job("batch"), priority="batch"))
    assert s.admit() == rows("batch", 0)


def test_a_batch_pool_steps_after_an_interactive_one_but_does_step():
    s = scheduler(
        4,
        replace(long("batch", width=128, deadline=1.0), priority="batch"),
        long("interactive", 100, deadline=90.0),
    )
    machine = Machine(s)
    assert "".join(machine.step()[0].job[0] for _ in range(8)) == ("i" * PATIENCE + "b") * 2


# ── pools ─────────────────────────────────────────────────────────────────────────────────────────


def test_deterministic_rows_step_with_nothing_but_themselves():
    fixed = replace(
        long("fixed", 2), seeds=(0, 1), sampling=replace(SAMPLING, steps=2, deterministic=True)
    )
    machine = Machine(scheduler(8, fixed, long("other", 2)))
    machine.run()
    assert {len(turn) for turn in machine.turns} == {1}
    assert len(machine.turns) == 6


def test_a_suspect_s_rows_step_together_and_with_nobody_else():
    machine = Machine(
        scheduler(
            8,
            replace(long("suspect", 3, alone=True), seeds=(0, 1)),
            long("other", 3),
            long("more", 3),
        )
    )
    machine.run()
    assert [{row.job for row in turn} for turn in machine.turns] == [
        {"suspect"},
        {"other", "more"},
    ] * 3


@pytest.mark.parametrize(
    ("prompt", "negative", "length"),
    [
        ("", "", 96),
        ("a" * 95, "", 96),
        ("a" * 96, "", 256),
        ("ä" * 48, "", 256),
        ("a", "b" * 300, 768),
        ("a" * 4000, "", 768),
        ("\ud800", "", 96),
    ],
)
def test_conditions_of_a_kind_share_a_pool_by_the_bytes_of_their_texts(prompt, negative, length):
    guided = replace(SAMPLING, guidance=(4.0, 4.0), guidance_steps=1)
    assert (
        Pool.of(
            replace(job("a"), prompt=prompt, negative_prompt=negative, sampling=guided), 0
        ).length
        == length
    )


def test_a_negative_prompt_that_no_step_reads_does_not_count():
    assert Pool.of(replace(job("a"), negative_prompt="b" * 300), 0).length == LENGTHS[0]
