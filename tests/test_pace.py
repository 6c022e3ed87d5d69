"""The pace of work: busy seconds per unit."""

from __future__ import annotations

import pytest

from server.pace import Pace


def test_the_pace_is_of_the_busy_time_of_about_ten_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("server.pace.time.monotonic", lambda: now)
    pace = Pace(last_finish=now)
    assert pace.seconds_per_unit == pytest.approx(0.2)
    now = 102.0
    pace.record(4, began=100.0)
    assert pace.seconds_per_unit == pytest.approx((0.9 * 0.2 + 2) / (0.9 + 4))
    now = 103.0
    pace.record(2, began=101.0)  # half of its time was the one's before it
    assert pace.seconds_per_unit == pytest.approx((0.9 * 2.18 + 1) / (0.9 * 4.9 + 2))
    now = 111.0
    pace.record(1, began=110.0)  # idle until then
    assert pace.seconds_per_unit == pytest.approx((0.9 * 2.962 + 1) / (0.9 * 6.41 + 1))
