"""Rejected clients are told to return one after the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.retry_slots import HORIZON_S, RetrySlots


def test_each_client_is_told_a_later_time_by_what_its_request_costs() -> None:
    slots = RetrySlots()
    assert slots.take(2.0, 0.5, now=100.0) == pytest.approx(2.0)
    assert slots.take(2.0, 0.5, now=100.0) == pytest.approx(2.5)
    assert slots.take(2.0, 3.0, now=101.0) == pytest.approx(4.5)
    assert slots.take(9.0, 0.5, now=101.0) == pytest.approx(9.0), "no sooner than there is room"
    assert slots.take(1.0, 0.5, now=200.0) == pytest.approx(1.0), "old slots are over"


def test_requests_that_cost_nothing_are_still_told_different_milliseconds() -> None:
    slots = RetrySlots()
    told = [slots.take(1.0, 0.0, now=0.0) for _ in range(100)]
    assert [round(1000 * seconds) for seconds in told] == list(range(1000, 1100))


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 90), st.floats(0, 30))))
def test_no_flood_of_rejections_pushes_a_retry_beyond_the_horizon(
    rejections: list[tuple[float, float, float]],
) -> None:
    slots, now = RetrySlots(), 0.0
    for pause, earliest_s, spacing_s in rejections:
        now += pause
        told = slots.take(earliest_s, spacing_s, now)
        assert earliest_s - 1e-6 <= told <= max(earliest_s, HORIZON_S) + 1e-6
