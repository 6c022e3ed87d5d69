"""What is read from Locust's statistics."""

from __future__ import annotations

import pytest

from load_tests.scenarios import Row, quantile, read

ENTRY = {
    "name": "/generate",
    "num_requests": 4,
    "num_failures": 1,
    "response_times": {"80": 2, "100": 1, "2000": 1},
}


@pytest.mark.parametrize(
    ("q", "value"), [(0.5, 80), (0.51, 100), (0.75, 100), (0.99, 2000), (1, 2000)]
)
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(q: float, value: float) -> None:
    assert quantile({80: 2, 2000: 1, 100: 1}, q) == value


def test_every_path_is_a_row_in_the_order_of_their_names() -> None:
    rows = read("Generate", [ENTRY, ENTRY | {"name": "/edit"}])
    assert [row.request for row in rows] == ["/edit", "/generate"]
    assert rows[1] == Row(
        "Generate", "/generate", requests=4, failures=1, p50_ms=80, p95_ms=2000, p99_ms=2000
    )
