"""The comparison's table and figures, from answers that were made up."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from load_tests.batching import Measured, _parse, _table, compare
from load_tests.traffic import Answer, Kind, Target

SMALL, LARGE = Kind(64, 8), Kind(192, 16)
SEARCH = {"max_batch_size": 8, "batch_timeout_s": 0.05}


def measured(name: str, alone: float, seconds: float) -> Measured:
    """A server whose every answer takes as long."""
    answers = [Answer(kind, 200, seconds) for kind in (SMALL, LARGE)]
    return Measured(
        Target(name, "http://server"), {SMALL: alone, LARGE: 2 * alone}, [10.0, 14.0], answers
    )


def test_ratios_are_ours_over_theirs_and_slowdowns_refer_to_the_faster_server() -> None:
    result = compare(
        SEARCH, 9.6, peer=measured("litserve", 0.2, 2.0), own=measured("paellera", 0.1, 0.5)
    )
    assert result["litserve"]["slowdown"]["p50"] == pytest.approx(7.5)
    assert result["litserve"]["slowdown_common"]["p50"] == pytest.approx(15)
    assert result["paellera"]["slowdown"] == result["paellera"]["slowdown_common"]
    assert result["ratios"]["throughput"] == 1
    assert result["ratios"]["p99_latency"] == 0.25
    assert result["ratios"]["p99_slowdown_common"] == 0.25
    assert result["met"] == {
        "p99_slowdown": True,
        "p99_slowdown_common": True,
        "throughput": True,
        "all_answered": True,
    }


@pytest.mark.parametrize(
    ("seconds", "saturated", "missed"),
    [(1.5, [12.0], {"p99_slowdown", "p99_slowdown_common"}), (0.5, [11.0], {"throughput"})],
)
def test_too_slow_a_tail_and_too_few_answers_miss_their_targets(
    seconds: float, saturated: list[float], missed: set[str]
) -> None:
    own = measured("paellera", 0.2, seconds)
    own.saturated = saturated
    met = compare(SEARCH, 9.6, peer=measured("litserve", 0.2, 2.0), own=own)["met"]
    assert {name for name, reached in met.items() if not reached} == missed


def test_answers_that_are_no_pictures_are_counted() -> None:
    own = measured("paellera", 0.1, 0.5)
    own.answers.append(Answer(SMALL, 503, 0.1))
    result = compare(SEARCH, 9.6, peer=measured("litserve", 0.2, 2.0), own=own)
    assert result["paellera"]["not_200"] == 1
    assert not result["met"]["all_answered"]


def test_the_table_has_a_column_for_each_server_and_one_for_the_ratio() -> None:
    result = compare(
        SEARCH, 9.6, peer=measured("litserve", 0.2, 2.0), own=measured("paellera", 0.1, 0.5)
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (row,) = (line for line in text.splitlines() if "p99 latency" in line)
    assert row.split()[1::2][2:] == ["2000.00", "500.00", "0.25"]
    assert "batches of 8, timeout 0.05 s" in text


@pytest.mark.parametrize("arguments", [["--sides", "64,"], ["--steps", "0"], ["--seconds", "long"]])
def test_impossible_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _parse(arguments)
