"""What the soak test calls a leak, and which requests it sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from load_tests.soak import Snapshot

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
    "change", [{"api_mib": 61.3}, {"worker_mib": 613.0}, {"api_files": 20}, {"worker_threads": 4}, {"tasks": 6}, {"rows": 1}]
)
def test_whatever_else_grows_is_named(change: dict[str, float]) -> None:
    (name,) = change
    (violation,) = replace(FIRST, **change).violations(FIRST)  # type: ignore[arg-type]
    assert violation.startswith(f"{name}: ")


def test_less_than_before_is_no_leak() -> None:
    assert replace(FIRST, api_files=15, worker_mib=500.0, tasks=4).violations(FIRST) == []
