"""What the fault test counts as lost, and that its server breaks as it is told."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from load_tests.faults import Fault, Outcome, Trial, _parse, _references
from load_tests.faults import request as body_of
from load_tests.serving import free_port, serving

pytestmark = pytest.mark.process

GOOD = Outcome(
    "kill",
    in_flight=9,
    answered=8,
    failed_as_meant=1,
    same_bytes=True,
    replayed=9,
    ready_after_s=5.0,
)


def test_an_outcome_is_good_when_all_are_accounted_for_and_the_bytes_are_the_same() -> None:
    assert GOOD.good
    assert GOOD.lost == 0


@pytest.mark.parametrize(
    "change", [{"answered": 7}, {"failed_as_meant": 0}, {"same_bytes": False}, {"exit_code": -15}]
)
def test_anything_else_is_not(change: dict[str, int]) -> None:
    assert not replace(GOOD, **change).good  # type: ignore[arg-type]


async def test_an_instrumented_server_breaks_on_demand_and_loses_nothing(
    random_bundle: Path,
) -> None:
    options = _parse(["--requests", "2", "--side", "32", "--steps", "64"])
    bodies = [body_of("a red apple", seed, options) for seed in range(options.requests)]
    settings = {
        "PAELLERA_WEIGHTS": str(random_bundle),
        "PAELLERA_THREADS": "1",
        "PAELLERA_LOG_LEVEL": "error",
    }
    with serving(settings, ("-m", "load_tests.instrumented")) as server:
        trial = Trial(server, bodies, await _references(server, bodies))
        outcome = await trial.run(Fault("exception", guilty="bug", meant="internal"))
        repeated = await trial.run(Fault("client dies", repeated=True))
    assert (outcome.in_flight, outcome.answered, outcome.failed_as_meant) == (3, 2, 1)
    assert outcome.good
    assert (repeated.in_flight, repeated.answered) == (3, 3)
    assert repeated.good


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the port for its server")
def test_a_port_for_a_server_is_given_to_no_other_socket() -> None:
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)) as listener:
        assert listener.getsockname()[1] == port
