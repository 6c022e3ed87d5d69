"""Where the curve looks next, and what it calls sustained, on target and failed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from load_tests.curve import FACTOR, PRECISION, Point, evaluate, next_rate, summary
from load_tests.traffic import Answer, Arrival, Kind

KIND = Kind(128, 12)
LATENCY = {"n": 100, "p50_ms": 80.0, "p95_ms": 120.0, "p99_ms": 150.0}
GOOD = Point(rate=4, arrived=4, served=4, latency=LATENCY, under_target=1, refused=0, failed=0)


def search(capacity: float, first: float = 4) -> list[Point]:
    """The rates tried on a server that sustains up to `capacity`."""
    points: list[Point] = []
    while (rate := next_rate(points, first)) is not None:
        points.append(replace(GOOD, rate=rate, arrived=rate, served=min(rate, capacity)))
    return points


@pytest.mark.parametrize("capacity", [1.3, 4.1, 21, 300])
def test_the_knee_is_found_to_the_precision_promised_in_few_steps(capacity: float) -> None:
    points = search(capacity)
    sustained = max(point.rate for point in points if point.sustained)
    saturated = min(point.rate for point in points if not point.sustained)
    assert sustained < saturated <= PRECISION * sustained
    assert len(points) <= 20


def test_rates_grow_until_one_is_not_sustained() -> None:
    rates = [point.rate for point in search(10)]
    assert rates[:4] == [4, 4 * FACTOR, 4 * FACTOR**2, 4 * FACTOR**3]
    assert all(rate < rates[3] for rate in rates[4:])


@pytest.mark.parametrize(
    ("change", "sustained"),
    [({"served": 3.8}, True), ({"served": 3.7}, False), ({"refused": 0.02}, False)],
)
def test_saturated_is_who_answers_too_little_or_refuses_too_much(
    change: dict[str, float], sustained: bool
) -> None:
    assert replace(GOOD, **change).sustained is sustained


def test_only_what_was_due_after_the_warm_up_counts_and_serving_by_when_it_was_answered() -> None:
    trace = [Arrival(at, KIND, seed) for seed, at in enumerate((0.5, 1.9, 2.5, 3.0, 9.8, 4.0, 5.0))]
    answers = [Answer(KIND, 200, taken) for taken in (0.1, 0.2, 0.1, 0.9, 0.4)]
    answers += [Answer(KIND, 429, 0.01, refused=True), Answer(KIND, 500, 0.01)]
    point = evaluate(3, trace, answers, warm_up=2, seconds=8)
    # Of five that counted three were answered, two of them in half a second; in the eight seconds
    # ended those of 1.9, 2.5 and 3.0.
    assert (point.arrived, point.served) == (5 / 8, 3 / 8)
    assert (point.latency["n"], point.under_target, point.refused, point.failed) == (
        3,
        0.4,
        0.2,
        0.2,
    )


def test_the_summary_has_the_answers_at_the_knee_and_at_the_last_rate_within_half_a_second() -> (
    None
):
    good = replace(GOOD, served=3.9)
    slow = replace(GOOD, rate=9, arrived=9, served=8.9, latency=LATENCY | {"p99_ms": 900.0})
    saturated = replace(slow, rate=13, arrived=13, served=10)
    found = summary([good, saturated, slow])
    assert (found["knee_per_s"], found["on_target_per_s"]) == (8.9, 3.9)
    assert [point["sustained"] for point in found["points"]] == [True, True, False]
    assert summary([saturated])["knee_per_s"] == 0
