"""What the soak test calls a leak or an error, and how its requests are divided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from load_tests.soak import Snapshot, Tenth, highest, judge, shares

FIRST = Snapshot(
    requests=1000,
    api_mib=60.0,
    worker_mib=600.0,
    api_files=19,
    worker_files=8,
    api_threads=9,
    worker_threads=3,
    tasks=5,
    rows=0,
)


def test_two_percent_more_memory_is_no_leak() -> None:
    assert replace(FIRST, requests=10_000, api_mib=61.2, worker_mib=612.0).violations(FIRST) == []


@pytest.mark.parametrize(
    "change",
    [
        {"api_mib": 61.3},
        {"worker_mib": 613.0},
        {"api_files": 20},
        {"worker_threads": 4},
        {"tasks": 6},
        {"rows": 1},
    ],
)
def test_whatever_else_grows_is_named(change: dict[str, float]) -> None:
    (name,) = change
    (violation,) = replace(FIRST, **change).violations(FIRST)  # type: ignore[arg-type]
    assert violation.startswith(f"{name}: ")


def test_less_than_before_is_no_leak() -> None:
    assert replace(FIRST, api_files=15, worker_mib=500.0, tasks=4).violations(FIRST) == []


def test_the_requests_are_divided_into_tenths_and_each_is_sent_once() -> None:
    tenths = [list(numbers) for numbers in shares(1004, None)]
    assert [len(tenth) for tenth in tenths] == [100, 100, 101, 100, 101, 100, 100, 101, 100, 101]
    assert [number for tenth in tenths for number in tenth] == list(range(1004))


def test_minutes_are_divided_by_time_and_no_number_is_used_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100_000))
    monkeypatch.setattr("load_tests.soak.time.monotonic", lambda: float(next(clock)))
    tenths = [list(numbers) for numbers in shares(0, 5.0)]
    assert all(28 <= len(tenth) <= 30 for tenth in tenths)
    assert [number for tenth in tenths for number in tenth] == list(range(sum(map(len, tenths))))


def tenths(growth_mib: float, p99_growth: float) -> list[Tenth]:
    """Ten tenths of six minutes each."""
    return [
        Tenth(
            replace(FIRST, requests=1000 * i, worker_mib=600 + growth_mib * i),
            360.0 * (i + 1),
            {"p99_ms": 100 + p99_growth * i},
        )
        for i in range(10)
    ]


def test_memory_is_told_by_the_hour_and_the_drift_of_p99_from_first_to_last() -> None:
    found = judge(tenths(1.0, 2.0), {200: 9000, 499: 500, 0: 500})
    assert found["memory_mib_per_hour"] == {
        "api_mib": pytest.approx(0, abs=0.01),
        "worker_mib": 10.0,
    }
    assert (found["p99_drift"], found["errors"], found["good"]) == (0.18, 0, True)


def test_an_error_is_counted_and_named() -> None:
    found = judge(tenths(0, 0), {200: 9000, 503: 2, 500: 1})
    assert (found["errors"], found["good"]) == (3, False)
    assert found["violations"] == ["status 503: 2", "status 500: 1"]


def test_beside_attacks_the_last_snapshot_is_compared_with_the_highest_of_the_first() -> None:
    later = [replace(FIRST, api_mib=90.0), replace(FIRST, api_threads=12)]
    assert highest([FIRST, *later]) == replace(FIRST, api_mib=90.0, api_threads=12)
    tenths = [Tenth(snapshot, 1.0 + at, {"p99_ms": 1.0}) for at, snapshot in enumerate(later)]
    rising = [*tenths, Tenth(replace(FIRST, api_mib=91.0), 9.0, {"p99_ms": 1.0})]
    assert judge(rising, {200: 3}, settling=2)["good"]
    rising[-1] = Tenth(replace(FIRST, api_mib=92.0), 9.0, {"p99_ms": 1.0})
    assert judge(rising, {200: 3}, settling=2)["violations"] == ["api_mib: 90 to 92"]
    assert not judge(rising, {200: 3})["good"]


def test_growth_counts_from_the_last_snapshot_that_settles() -> None:
    levels = [
        Tenth(replace(FIRST, worker_mib=mib), 360.0 * at, {"p99_ms": 1.0})
        for at, mib in enumerate((500.0, 900.0, 910.0, 920.0))
    ]
    assert judge(levels, {200: 4}, settling=2)["memory_mib_per_hour"]["worker_mib"] == 100.0
