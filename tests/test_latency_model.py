"""Predictions from measured steps: what is known, what is not, and how near they come to what a
scheduler then does.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from model.image_request import Edit, InputImage
from server.engine.job import Job
from server.engine.latency_model import MEMORY_S, LatencyModel
from server.engine.messages import Step, Timings
from server.engine.scheduler import Pool, RowId, Scheduler
from tests.test_fairness import PRIORITIES, Machine
from tests.test_scheduler import SAMPLING, job
from tests.test_upscale import enlarging, twice
from tests.test_worker import SAMPLING as GUIDED

SMALL, LARGE = 64 * 64, 256 * 64


def asked(id: str = "new", steps: int = 10, rows: int = 1, **changes: object) -> Job:
    return replace(job(id, rows), sampling=replace(SAMPLING, steps=steps), **changes)


def costs(*measured: tuple[int, int, float]) -> LatencyModel:
    made = LatencyModel()
    for rows, pixels, seconds in measured:
        made.record_step(Step(rows, rows, pixels, seconds, "tiny"), now=0.0)
    return made


def test_nothing_is_predicted_from_nothing():
    assert costs().predict(asked(), [], slots=4, now=0.0) is None


def test_an_idle_server_takes_a_job_s_steps_and_what_lies_around_them():
    made = costs((1, SMALL, 0.1))
    made.record_job(
        asked(rows=2), Timings(queue=9.0, encode=0.2, prior=0.1, denoise=9.0, decode=0.1), now=0.0
    )
    assert made.predict(asked(steps=10), [], slots=4, now=0.0) == pytest.approx(10 * 0.1 + 0.2)


def test_neighbours_in_a_step_cost_what_a_step_of_so_many_rows_does():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.16))
    assert made.predict(asked(steps=10), [asked("b", rows=3)], slots=4, now=0.0) == pytest.approx(
        10 * 0.16
    )
    assert made.predict(asked(steps=10), [asked("b")], slots=4, now=0.0) == pytest.approx(10 * 0.12)


def test_rows_that_are_nearly_done_are_hardly_in_the_way():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.16))
    assert made.predict(asked(steps=10), [asked("b", rows=3)], 4, 0.0, {"b": 3}) == pytest.approx(
        10 * 0.106
    )
    assert made.predict(asked(steps=10), [asked("b", rows=3)], 4, 0.0, {"b": 0}) == pytest.approx(
        10 * 0.1
    )


def test_a_row_without_a_slot_waits_for_the_steps_that_are_left():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.1))
    full, half, nothing = (
        made.predict(asked(steps=10), [asked("b", rows=4)], 4, 0.0, {"b": 4 * steps})
        for steps in (10, 5, 0)
    )
    assert full > half > nothing == pytest.approx(10 * 0.1)


def test_a_branch_costs_what_a_row_without_guidance_does():
    made = costs((1, SMALL, 0.1), (2, SMALL, 0.15), (4, SMALL, 0.25))
    guided = replace(
        asked(), sampling=replace(SAMPLING, steps=10, guidance=(4.0, 4.0), guidance_steps=10)
    )
    half = replace(guided, sampling=replace(guided.sampling, guidance_steps=5))
    assert made.predict(guided, [], slots=4, now=0.0) == pytest.approx(10 * 0.15)
    assert made.predict(half, [], slots=4, now=0.0) == pytest.approx(10 * 0.125)
    assert made.predict(guided, [replace(guided, id="b")], slots=4, now=0.0) == pytest.approx(
        10 * 0.25
    )


@pytest.mark.parametrize(("first", "step_s"), [(0, 0.1), (3, 0.13), (5, 0.15)])
def test_an_edit_costs_the_branches_of_the_steps_that_it_takes(first, step_s):
    """Five of ten steps are guided, and the edit takes the last five."""
    made = costs((1, SMALL, 0.1), (2, SMALL, 0.15))
    guided = replace(SAMPLING, steps=10, guidance=(4.0, 4.0), guidance_steps=5)
    image = InputImage.of(np.zeros((64, 64, 3), np.uint8))
    edit = replace(asked(), sampling=replace(guided, guidance_start=first), canvas=Edit(image, 0.5))
    for least in (False, True):
        seconds = made.predict(edit, [], slots=4, now=0.0, least=least)
        assert seconds == pytest.approx(5 * step_s)


def test_each_other_pool_takes_its_turn():
    made = costs((1, SMALL, 0.1), (1, LARGE, 0.5))
    assert made.predict(
        asked(steps=10), [asked("b", width=256)], slots=4, now=0.0
    ) == pytest.approx(10 * 0.6)


def test_rows_without_a_slot_wait_for_those_before_them():
    made = costs((4, SMALL, 0.1))
    alone = made.predict(asked(steps=10), [asked("b", rows=3)], slots=4, now=0.0)
    behind = made.predict(asked(steps=10), [asked("b", rows=11)], slots=4, now=0.0)
    assert alone == pytest.approx(1.0)
    assert behind == pytest.approx(1.0 + 8 / 4 * 1.0)


def test_deterministic_rows_cost_a_step_each():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.1))
    fixed = replace(asked(rows=4), sampling=replace(SAMPLING, steps=10, deterministic=True))
    assert made.predict(fixed, [], slots=4, now=0.0) == pytest.approx(10 * 4 * 0.1)


def test_other_sizes_and_row_counts_are_guessed_in_proportion():
    made = costs((2, SMALL, 0.2))
    assert made.step("tiny", LARGE, 2, now=0.0) == pytest.approx(0.8)
    assert made.step("tiny", SMALL, 8, now=0.0) == pytest.approx(0.8)
    assert made.step("tiny", SMALL, 1, now=0.0) == pytest.approx(0.1)


def test_the_least_prediction_scales_down_and_interpolates_but_never_scales_up():
    made = costs((2, SMALL, 0.2), (4, SMALL, 0.3))
    least = partial(made.step, now=0.0, least=True)
    assert least("tiny", SMALL, 1) == pytest.approx(0.1)
    assert least("tiny", SMALL, 3) == pytest.approx(0.25)
    assert least("tiny", SMALL, 8) == pytest.approx(0.3)
    assert least("tiny", LARGE, 2) == pytest.approx(0.2)
    assert least("tiny", SMALL // 4, 2) == pytest.approx(0.05)
    assert least("other", SMALL, 2) == 0
    assert costs().step("tiny", SMALL, 2, now=0.0, least=True) is None


def test_each_kind_of_job_has_its_own_time_around_the_steps():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.1))
    made.record_job(asked(width=256), Timings(encode=0.4, decode=0.4), now=0.0)
    small, large = asked(), asked(width=256)
    assert made.predict(small, [], 4, 0.0) == pytest.approx(10 * 0.1 + 0.2), "in proportion"
    assert made.predict(large, [], 4, 0.0) == pytest.approx(10 * 0.4 + 0.8)
    made.record_job(small, Timings(encode=0.1), now=0.0)
    assert made.predict(small, [large], 4, 0.0) == pytest.approx(10 * (0.1 + 0.4) + 0.1 + 0.8)
    assert made.predict(large, [], 4, 0.0, least=True) == pytest.approx(10 * 0.1 + 0.8)


def test_weights_are_measured_apart_and_others_are_only_a_likely_ground():
    made = costs((1, SMALL, 0.1))
    assert made.step("other", SMALL, 1, now=0.0) == pytest.approx(0.1)
    made.record_step(Step(1, 1, LARGE, 9.0, "other"), now=0.0)
    assert made.step("other", SMALL, 1, now=0.0) == pytest.approx(9 / 4)
    assert made.step("tiny", SMALL, 1, now=0.0) == pytest.approx(0.1)


def test_what_was_measured_long_ago_refuses_nobody():
    made = costs((1, SMALL, 1000.0))
    assert made.predict(asked(), [], slots=4, now=MEMORY_S - 1) is not None
    assert made.predict(asked(), [], slots=4, now=MEMORY_S) is None


def test_a_measured_step_is_averaged_with_the_last_five_and_the_latest_is_noted():
    made = costs((1, SMALL, 1.0))
    made.record_step(Step(1, 1, SMALL, 2.0, "tiny"), now=3.0)
    assert made.step("tiny", SMALL, 1, now=3.0) == pytest.approx(1.2)
    assert made.measured_at == 3.0
    for _ in range(20):
        made.record_step(Step(1, 1, SMALL, 0.1, "tiny"), now=3.0)
    assert made.step("tiny", SMALL, 1, now=3.0) == pytest.approx(0.1, rel=0.2)


def test_seconds_around_a_job_s_steps_are_averaged_per_row_and_forgotten_after_a_minute():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.1))
    made.record_job(asked(rows=1), Timings(encode=0.3, prior=0.5, decode=0.2), now=0.0)
    made.record_job(asked(rows=1), Timings(encode=2.0), now=1.0)
    made.record_step(Step(1, 1, SMALL, 0.1, "tiny"), now=50.0)
    made.record_step(Step(4, 4, SMALL, 0.1, "tiny"), now=50.0)
    others = [asked("b", rows=3)]
    assert made.predict(asked(), others, slots=4, now=60.9) == pytest.approx(10 * 0.1 + 4 * 1.2)
    assert made.predict(asked(), others, slots=4, now=61.0) == pytest.approx(10 * 0.1)


def test_a_measurement_counts_for_a_minute():
    made = costs((1, SMALL, 0.1))
    made.record_step(Step(1, 1, LARGE, 0.8, "tiny"), now=50.0)
    assert made.step("tiny", SMALL, 1, now=59.9) == pytest.approx(0.1)
    assert made.step("tiny", SMALL, 1, now=60.0) == pytest.approx(0.2), (
        "in proportion to the larger size"
    )
    assert made.step("tiny", SMALL, 1, now=110.0) is None


def test_rows_beyond_the_slots_wait_for_a_share_of_the_rounds_at_constant_step_cost():
    made = costs((1, SMALL, 0.1), (4, SMALL, 0.1))
    assert made.predict(asked(steps=10), [asked("b", rows=11)], slots=4, now=0.0) == pytest.approx(
        3 * 10 * 0.1
    )


def test_no_more_rows_than_slots_share_a_step():
    made = costs((4, SMALL, 0.1), (8, SMALL, 0.4))
    # 71 steps are left in 8 rows, of which 4 wait: 8.875 rounds, and the job's own.
    assert made.predict(
        asked(steps=1), [asked("b", rows=7, steps=10)], slots=4, now=0.0
    ) == pytest.approx(9.875 * 0.1)


def test_rows_of_a_pool_cost_their_branches_on_average():
    made = costs((1, SMALL, 0.1), (3, SMALL, 0.2), (4, SMALL, 0.9))
    guided = replace(SAMPLING, steps=10, guidance=(4.0, 4.0), guidance_steps=10)
    assert made.predict(
        asked(), [replace(asked("b"), sampling=guided)], slots=4, now=0.0
    ) == pytest.approx(10 * 0.2)


def test_a_pool_that_is_half_done_takes_half_of_its_turns():
    made = costs((1, SMALL, 0.1), (1, LARGE, 0.5), (2, LARGE, 0.9))
    others = [asked("b", width=256)]
    assert made.predict(asked(), others, slots=4, now=0.0, left={"b": 5}) == pytest.approx(
        10 * (0.1 + 0.5 * 0.5)
    )


def test_a_pool_with_more_steps_left_than_the_job_takes_no_more_turns_than_the_job():
    made = costs((1, SMALL, 0.1), (1, LARGE, 0.5), (2, LARGE, 0.9))
    others = [asked("b", width=256, steps=30)]
    assert made.predict(asked(), others, slots=4, now=0.0) == pytest.approx(10 * (0.1 + 0.5))


@pytest.mark.parametrize(("left", "seconds"), [(22, 2.1), (20, 2.0), (18, 1.9), (6, 1.3), (0, 1.0)])
def test_the_steps_left_of_an_enlarged_image_are_its_last_ones(left, seconds):
    """One image of 4 steps, then 9 tiles of 2 steps, each step of 2 branches."""
    made = costs((1, SMALL, 0.1), (20, SMALL, 2.0))
    enlarged = replace(
        twice("b", sampling=GUIDED, enlarge=replace(enlarging(64, 64), sampling=GUIDED)),
        model="tiny",
    )
    assert enlarged.row_steps == 22
    predicted = made.predict(asked(steps=10), [enlarged], 16, 0.0, {"b": left})
    assert predicted == pytest.approx(seconds)


def test_the_nearest_size_is_the_ground_for_others():
    made = costs((1, SMALL, 0.1), (1, LARGE, 0.8))
    assert made.step("tiny", 200 * 64, 1, now=0.0) == pytest.approx(0.8 * 200 / 256)
    assert made.step("tiny", 80 * 64, 1, now=0.0) == pytest.approx(0.1 * 80 / 64)


def test_between_two_counts_of_branches_a_step_lies_on_a_line_and_beyond_them_in_proportion():
    made = costs((2, SMALL, 0.1), (4, SMALL, 0.5), (8, SMALL, 0.6))
    expected = {1: 0.05, 2: 0.1, 3: 0.3, 4: 0.5, 5: 0.525, 8: 0.6, 16: 1.2}
    assert {n: made.step("tiny", SMALL, n, now=0.0) for n in expected} == pytest.approx(expected)


def test_a_prediction_looks_at_each_pass_once_and_reads_no_prompt(monkeypatch):
    class Unread(str):
        """Text that a job reads when it is made, and nobody later."""

        reads = 0

        def encode(self, *args: str) -> bytes:
            Unread.reads += 1
            return super().encode(*args)

    pools: list[int] = []
    of = Pool.of
    monkeypatch.setattr(Pool, "of", lambda job, index: pools.append(index) or of(job, index))
    made = costs((1, SMALL, 0.1))
    others = [asked(f"{i}", rows=50, prompt=Unread("a ball")) for i in range(3)]
    Unread.reads = 0
    made.predict(asked(), others, 16, 0.0)
    assert (pools, Unread.reads) == ([0] * 4, 0)


# Interactive jobs that arrive later pass batch jobs.
@pytest.mark.parametrize(("priorities", "middle"), [(["interactive"], 0.7), (PRIORITIES, 0.5)])
@pytest.mark.parametrize("seed", range(8))
def test_predictions_are_near_what_the_scheduler_does(seed, priorities, middle):
    """Jobs of three sizes arrive at random under a load that fills the slots; each prediction is
    compared with its job's finish. As in the client, batch jobs do not count for interactive ones.
    """
    rng = random.Random(seed)
    slots, made, scheduler = 8, LatencyModel(), Scheduler(8)

    def seconds(rows: int, width: int) -> float:
        return (0.02 + 0.01 * rows) * width / 64

    def measured(turn: list[RowId]) -> float:
        width = scheduler.job(turn[0].job).width
        made.record_step(
            Step(len(turn), len(turn), width * 64, seconds(len(turn), width), "tiny"), now=0.0
        )
        return seconds(len(turn), width)

    machine = Machine(scheduler, measured)
    todo: dict[str, Job] = {}
    predicted: dict[str, tuple[float, float]] = {}
    for i in range(300):
        if i < 200 and rng.random() < 0.15:
            new = asked(
                f"{i}",
                rng.randint(4, 16),
                rng.randint(1, 4),
                width=rng.choice([64, 64, 64, 128]),
                deadline=machine.now + 60,
                priority=rng.choice(priorities),
            )
            others = [
                each
                for each in todo.values()
                if (each.priority, new.priority) != ("batch", "interactive")
            ]
            left = {
                id: sum(j.sampling.steps - machine.steps[RowId(id, r)] for r in range(len(j.seeds)))
                for id, j in todo.items()
            }
            if (guess := made.predict(new, others, slots, 0.0, left)) is not None:
                predicted[new.id] = (machine.now, guess)
            todo[new.id] = new
            scheduler.add(new)
        if todo:
            machine.step()
        for id in [
            id
            for id, each in todo.items()
            if all(RowId(id, r) in machine.finished_at for r in range(len(each.seeds)))
        ]:
            scheduler.remove(id)
            took = max(at for row, at in machine.finished_at.items() if row.job == id)
            if id in predicted:
                arrived, guess = predicted.pop(id)
                predicted[f"{id} done"] = (took - arrived, guess)
            del todo[id]
    ratios = sorted(guess / took for id, (took, guess) in predicted.items() if id.endswith("done"))
    assert len(ratios) >= 10
    assert middle < ratios[len(ratios) // 2] < 1.6
    # Who arrives later cannot be foreseen, so a few are far off.
    tenth = len(ratios) // 10
    assert 0.3 < ratios[tenth] <= ratios[-1 - tenth] < 3
