"""What is made of Schemathesis's reports."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from load_tests.fuzz import count, judge

ROOT = Path(__file__).parents[1]

SUMMARY: dict[str, Any] = {
    "test_cases": {"generated": 5200},
    "failures": [],
    "errors": [],
    "phases": {"coverage": {"status": "success"}, "stateful": {"status": "success"}},
    "operations": {"total": 12, "tested": 12},
    "seed": 0,
}


def scenario(phase: str, mode: str, *statuses: int | None) -> dict[str, Any]:
    """An event as Schemathesis writes it; None is a request without an answer."""
    cases = {
        str(i): {"value": {"meta": {"generation": {"mode": mode}}}} for i in range(len(statuses))
    }
    interactions = {
        str(i): {"response": status and {"status_code": status}}
        for i, status in enumerate(statuses)
    }
    return {
        "ScenarioFinished": {
            "phase": phase,
            "recorder": {"cases": cases, "interactions": interactions},
        }
    }


def test_answers_are_counted_by_phase_validity_and_status() -> None:
    events = [
        {"EngineStarted": {}},
        scenario("fuzzing", "positive", 200, 200, 422),
        scenario("coverage", "negative", 422, None),
    ]
    assert count(iter(events)) == {
        ("fuzzing", "positive", 200): 2,
        ("fuzzing", "positive", 422): 1,
        ("coverage", "negative", 422): 1,
        ("coverage", "negative", 0): 1,
    }


def test_a_run_without_findings_is_good() -> None:
    judged = judge(SUMMARY, at_least=5000)
    assert judged["good"]
    assert (judged["requests"], judged["found"]) == (5200, [])


@pytest.mark.parametrize(
    "change",
    [
        {"failures": [{"title": "Server error"}]},
        {"errors": ["no connection"]},
        {"test_cases": {"generated": 4999}},
        {"phases": {"coverage": {"status": "interrupted"}}},
        {"operations": {"total": 12, "tested": 11}},
    ],
)
def test_findings_errors_and_too_few_requests_are_not(change: dict[str, Any]) -> None:
    assert not judge(SUMMARY | change, at_least=5000)["good"]


def test_selected_paths_may_have_nothing_for_a_phase() -> None:
    phases = {"examples": {"status": "skip"}, "coverage": {"status": "success"}}
    selected = {"total": 12, "selected": 2, "tested": 2}
    summary = SUMMARY | {"phases": phases, "operations": selected}
    assert judge(summary, 5000, partial=True)["good"]
    assert not judge(summary, 5000)["good"]


def test_every_reason_that_excuses_a_refusal_is_a_message_of_the_server() -> None:
    tree = ast.parse((ROOT / "load_tests" / "fuzz_hooks.py").read_text())
    (reasons,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SEMANTIC"
    )
    texts = [
        path.read_text() for part in ("server", "model") for path in (ROOT / part).rglob("*.py")
    ]
    # A message that is written over several lines is one.
    source = re.sub(r'"\s*\n\s*[rf]?"', "", "\n".join(texts))
    assert [reason for reason in reasons if reason not in source] == []
