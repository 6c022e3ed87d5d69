"""Who steps when, in simulated time: turns by arrival, bounded waits, priorities, pools of one's
own, and streams that never end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.job import Job
from server.engine.scheduler import (
    BATCH_TURN,
    INTERACTIVE_SHARE,
    LENGTHS,
    PATIENCE,
    STARTS,
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
        self.admitted: set[RowId] = set()
        self.turns: list[list[RowId]] = []
        self.steps: Counter[RowId] = Counter()
        self.finished_at: dict[RowId, float] = {}

    def step(self) -> list[RowId]:
        self.admitted.update(self.scheduler.admit())
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


PRIORITIES = ["interactive", "batch"]


def long(id: str, steps: int = 12, **changes: object) -> Job:
    return replace(job(id), sampling=replace(SAMPLING, steps=steps), **changes)


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_pool_with_the_earliest_arrival_steps_first_whatever_the_deadlines():
    s = scheduler(
        9,
        long("late", width=128, arrived_at=2.0, deadline=20.0),
        long("early", arrived_at=1.0, deadline=600.0),
    )
    machine = Machine(s)
    assert [machine.step()[0].job for _ in range(PATIENCE)] == ["early"] * PATIENCE


def test_a_pool_that_arrived_late_waits_for_a_bounded_number_of_steps():
    s = scheduler(
        9, long("late", width=128, arrived_at=2.0), long("early", arrived_at=1.0, steps=100)
    )
    machine = Machine(s)
    turns = "".join(machine.step()[0].job[0] for _ in range(12))
    assert turns == ("e" * PATIENCE + "l") * 3


@given(
    pools=st.lists(
        st.tuples(st.integers(1, 40), st.floats(0, 100), st.sampled_from(PRIORITIES)),
        min_size=1,
        max_size=8,
    ),
)
def test_no_pool_waits_longer_than_the_bound_whenever_they_arrived(pools):
    s = Scheduler(16)
    for i, (steps, arrived_at, priority) in enumerate(pools):
        s.add(long(f"{i}", steps, width=64 * (i + 1), arrived_at=arrived_at, priority=priority))
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


def test_a_large_picture_that_arrives_later_does_not_hold_up_a_small_one():
    cost = {64: 1.0, 512: 10.0}
    s = scheduler(4, long("small", 8))
    machine = Machine(s, lambda turn: cost[s.job(turn[0].job).width])
    machine.step()
    s.add(long("large", 64, width=512, arrived_at=1.0))
    machine.run()
    # Its own eight steps, and no more than one of the large one's for every three of them.
    assert machine.finished_at[RowId("small", 0)] <= 8 * 1.0 + 3 * 10


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


def test_waiting_rows_are_admitted_by_the_request_s_arrival_and_not_by_deadline():
    s = scheduler(
        1,
        long("fourth", 1, arrived_at=9.0, deadline=10.0),
        long("second", 1, arrived_at=2.0, deadline=600.0),
        long("third", 1, arrived_at=2.0, deadline=3.0),
        long("first", 1, arrived_at=1.0, deadline=601.0),
    )
    machine = Machine(s)
    machine.run()
    assert [turn[0].job for turn in machine.turns] == ["first", "second", "third", "fourth"]


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
    s = scheduler(1, replace(job("batch", 2, deadline=1000.0), priority="batch"))
    machine = Machine(s)
    for i in range(2 * BATCH_TURN):
        s.add(job(f"interactive{i}", deadline=float(i)))
        machine.step()
    turns = [i for i, turn in enumerate(machine.turns) if turn[0].job == "batch"]
    assert turns == [BATCH_TURN - 1, 2 * BATCH_TURN - 1]


def test_a_batch_row_never_passes_an_interactive_one_that_arrived_before_it():
    waiting = [long(f"interactive{i}", 1, arrived_at=float(i)) for i in range(3 * BATCH_TURN)]
    batch = long("batch", 1, arrived_at=2 * BATCH_TURN - 0.5, priority="batch")
    machine = Machine(scheduler(1, *waiting, batch))
    machine.run()
    order = [turn[0].job for turn in machine.turns]
    assert order.index("batch") == 2 * BATCH_TURN


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


# ── both priorities in one pool ───────────────────────────────────────────────────────────────────


def beside_batch(steps: int, batch_rows: int, **options: bool) -> Machine:
    """Run an interactive image that arrives while images of a batch request of its pool run; a step
    takes a second for each of its rows.
    """
    s = Scheduler(16, **options)
    batch = replace(long("batch", 100, priority="batch"), seeds=tuple(range(batch_rows)))
    s.add(batch)
    machine = Machine(s, len)
    machine.step()
    machine.now = 0.0
    s.add(long("interactive", steps, arrived_at=1.0))
    while RowId("interactive", 0) not in machine.finished_at:
        machine.step()
    return machine


def test_an_interactive_row_steps_without_the_batch_rows_of_its_pool():
    machine = beside_batch(PATIENCE, batch_rows=12)
    assert machine.turns[1:] == [rows("interactive", 0)] * PATIENCE
    assert machine.finished_at[RowId("interactive", 0)] == PATIENCE


def test_batch_rows_take_part_in_every_fourth_step_beside_interactive_ones():
    machine = beside_batch(3 * (PATIENCE + 1), batch_rows=2)
    assert [len(turn) for turn in machine.turns[1:]] == ([1] * PATIENCE + [3]) * 3


def test_where_rows_cost_little_both_priorities_share_every_step():
    machine = beside_batch(PATIENCE, batch_rows=2, batch_waits=False)
    assert [len(turn) for turn in machine.turns[1:]] == [3] * PATIENCE


def test_a_batch_row_that_joins_an_interactive_pool_waits_from_then_on():
    s = scheduler(4, long("interactive", 100))
    machine = Machine(s)
    for _ in range(2 * PATIENCE):
        machine.step()
    s.add(long("batch", 1, priority="batch"))
    turns = [{row.job for row in machine.step()} for _ in range(PATIENCE + 1)]
    assert turns == [{"interactive"}] * PATIENCE + [{"interactive", "batch"}]


@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 60), st.integers(1, 9), st.sampled_from(PRIORITIES), st.booleans()
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_no_running_row_waits_for_long_and_all_finish_whatever_their_priorities(arrivals):
    s = Scheduler(8)
    machine = Machine(s)
    todo = [
        long(f"{i}", steps, width=128 if wide else 64, arrived_at=float(at), priority=priority)
        for i, (at, steps, priority, wide) in enumerate(sorted(arrivals))
    ]
    count, waited = len(todo), Counter[RowId]()
    while todo or s.rows_waiting or s.rows_running:
        while todo and todo[0].arrived_at <= machine.now:
            s.add(todo.pop(0))
        if not machine.step():
            continue
        for row in machine.admitted - machine.finished_at.keys():
            waited[row] = 0 if row in machine.turns[-1] else waited[row] + 1
            # Of two pools, one waits for `PATIENCE` steps, and its batch rows for its next turn.
            assert waited[row] <= 2 * PATIENCE + 1
    assert len(machine.finished_at) == count


# ── streams that never end ────────────────────────────────────────────────────────────────────────


def answered_after(
    special: Job, stream: Callable[[int, float], Job], slots: int = 2, most: int = 400
) -> float | None:
    """Return the seconds that a job takes beside a stream that arrives as fast as it is served,
    behind a queue that is full already; None if it is not served while the stream lasts.
    """
    s = Scheduler(slots)
    machine = Machine(s)
    sent, arrived_at = 0, 10.0
    while sent < 4 * slots:
        s.add(stream(sent, float(sent) / slots))
        sent += 1
    machine.now = arrived_at
    s.add(replace(special, arrived_at=arrived_at, deadline=arrived_at + special.deadline))
    row = RowId(special.id, 0)
    while row not in machine.finished_at and sent < most:
        before = set(machine.finished_at)
        machine.step()
        for done in machine.finished_at.keys() - before:
            if done != row:
                s.remove(done.job)
                s.add(stream(sent, machine.now))
                sent += 1
    return machine.finished_at[row] - arrived_at if row in machine.finished_at else None


def usual(number: int, now: float) -> Job:
    return long(f"usual{number}", 3, arrived_at=now, deadline=now + 60)


def hurried(number: int, now: float) -> Job:
    return replace(usual(number, now), deadline=now + 5)


@pytest.mark.parametrize("stream", [usual, hurried])
@pytest.mark.parametrize("width", [64, 128])
def test_who_allows_more_time_is_answered_as_soon_as_the_others(stream, width):
    usual_s = answered_after(long("usual", 3, width=width, deadline=60.0), stream)
    patient_s = answered_after(long("patient", 3, width=width, deadline=600.0), stream)
    assert usual_s is not None
    assert patient_s == usual_s
    # Those that were there before it, and its own steps beside the others' turns.
    assert patient_s <= 4 * 3 + 3 * (PATIENCE + 1)


@pytest.mark.parametrize("deadline", [5.0, 60.0, 600.0])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_batch_is_answered_beside_an_endless_stream_and_never_sooner_than_interactive(
    deadline, width, slots
):
    asked = long("asked", 3, width=width, deadline=deadline)
    interactive_s = answered_after(asked, usual, slots)
    batch_s = answered_after(replace(asked, priority="batch"), usual, slots)
    assert interactive_s is not None
    assert batch_s is not None
    assert interactive_s <= batch_s


@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from([5.0, 60.0, 600.0]),
            st.sampled_from(PRIORITIES),
        ),
        min_size=1,
        max_size=40,
    ),
    slots=st.integers(1, STARTS),
)
def test_no_row_of_one_size_starts_before_an_earlier_interactive_one(arrivals, slots):
    s = Scheduler(slots)
    machine = Machine(s)
    jobs = {
        f"{i}": long(f"{i}", 4, arrived_at=float(at), deadline=at + allowed, priority=priority)
        for i, (at, allowed, priority) in enumerate(sorted(arrivals))
    }
    todo = list(jobs.values())
    started: list[str] = []
    while todo or s.rows_waiting or s.rows_running:
        while todo and todo[0].arrived_at <= machine.now:
            s.add(todo.pop(0))
        waiting = [id for id in jobs if id not in started and jobs[id].arrived_at <= machine.now]
        admitted = [row.job for row in s.admit()]
        for id in admitted:
            earlier = [other for other in waiting if int(other) < int(id)]
            passed = [
                other
                for other in earlier
                if jobs[other].priority == "interactive" and other not in admitted
            ]
            assert not passed
        started += admitted
        if s.rows_running:
            machine.step()
        else:
            machine.now += 1.0


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
