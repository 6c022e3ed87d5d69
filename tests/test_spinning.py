"""How long threads spin, said before they begin."""

from __future__ import annotations

import os

import pytest

from server.engine.cpu_threads import SPINS, bound_spinning


@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_how_long_they_spin(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(said))
    bound_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
