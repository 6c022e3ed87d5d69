"""A CPU's cores are divided among the workers that compute, and stay so for a moment."""

from __future__ import annotations

import pytest

from server.engine import cpu_share
from server.engine.cpu_share import CALM_S, CPUShare


class Worker:
    """A worker that keeps what it is told."""

    def __init__(self) -> None:
        self.computes_on_cpu = False
        self.told: list[int] = []

    def share_cpu(self, workers: int) -> None:
        self.told.append(workers)


class Machine:
    """Three workers and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.workers = [Worker() for _ in range(3)]
        self.share = CPUShare(self.workers)

    def monotonic(self) -> float:
        return self.now

    def compute(self, *busy: int) -> list[int | None]:
        """Let these compute from now on; return what each was told last."""
        for number, worker in enumerate(self.workers):
            worker.computes_on_cpu = number in busy
        self.share.update()
        return [worker.told[-1] if worker.told else None for worker in self.workers]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(cpu_share, "time", machine)
    return machine


def test_those_that_compute_share_and_idle_ones_are_told_nothing(machine: Machine) -> None:
    assert machine.compute(0) == [1, None, None]
    assert machine.compute(0, 2) == [2, None, 2]
    assert machine.compute(0, 1, 2) == [3, 3, 3]


def test_one_that_is_alone_for_a_moment_does_not_take_all_cores(machine: Machine) -> None:
    machine.compute(0, 1)
    machine.now += CALM_S
    assert machine.compute(0) == [2, 2, None]
    assert machine.compute(0, 1) == [2, 2, None]
    machine.now += CALM_S
    assert machine.compute(1) == [2, 2, None], "they computed at once a moment ago"


def test_one_that_stays_alone_takes_all_cores(machine: Machine) -> None:
    machine.compute(0, 1)
    machine.now += CALM_S + 0.01
    assert machine.compute(1) == [2, 1, None]


def test_two_of_three_share_by_two_after_a_moment(machine: Machine) -> None:
    machine.compute(0, 1, 2)
    machine.now += CALM_S + 0.01
    assert machine.compute(0, 2) == [2, 3, 2]


def test_after_a_pause_the_first_one_has_all_cores_at_once(machine: Machine) -> None:
    machine.compute(0, 1)
    machine.now += 60
    machine.compute()
    assert machine.compute(1) == [2, 1, None]
