"""docs/performance.md is what the results say."""

from __future__ import annotations

from typing import Any

from load_tests.performance import PAGE, RESULTS, newest, page, results


def result(date: str, cpu: str = "EPYC", **more: Any) -> dict[str, Any]:
    return {"report": "bench", "date": date, "hardware": {"cpu": cpu}, **more}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(results(RESULTS)), "run python -m load_tests.performance"


def test_the_newest_of_each_machine_is_shown() -> None:
    old, new, other = result("2026-11-20"), result("2026-11-22"), result("2026-11-21", cpu="Xeon")
    assert newest([old, other, new], "bench") == [new, other]
    assert newest([old], "soak") == []


def test_families_that_were_measured_apart_are_both_shown() -> None:
    v1, v3 = (
        result("2026-11-21", report="full_size", families={family: {}}) for family in ("v1", "v3")
    )
    assert newest([v1, v3], "full_size") == [v1, v3]
