"""Steps are computed with as many threads as are fastest just now. The machine whose steps are
timed is simulated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from itertools import pairwise

import pytest

from server.engine import cpu_environment
from server.engine.cpu_environment import (
    KERNEL_CACHE_ENTRIES,
    SPIN_COUNT,
    limit_kernel_cache,
    limit_spin_count,
    worker_environment,
)
from server.engine.cpu_threads import LATE, SOON, SharedThreads, ThreadTuner

SHARE_OF_ONE = {1: 1.0, 2: 0.75, 4: 0.5, 8: 0.6, 16: 0.9}


class Machine:
    """Steps take `seconds(threads)` times their size on it. used: with how many threads each was
    computed.
    """

    def __init__(self, cores: int) -> None:
        self.now, self.computing = 0.0, cores
        self.used: list[int] = []
        self.seconds: Callable[[int], float] = SHARE_OF_ONE.__getitem__
        self.threads = ThreadTuner(cores, self.use, lambda: self.now)

    def use(self, threads: int) -> None:
        self.computing = threads

    def step(self, times: int = 1, kind: Hashable = "", size: float = 1) -> None:
        for _ in range(times):
            with self.threads.step(kind):
                self.used.append(self.computing)
                self.now += size * self.seconds(self.computing)

    def neighbour(self) -> None:
        """Takes a core: whatever waits for the thread on it waits long."""
        self.seconds = lambda threads: 1.1 if threads == 1 else 4.0


def test_undisturbed_all_cores_are_used_and_trials_become_rare() -> None:
    machine = Machine(2)
    machine.step(10 * LATE)
    assert machine.threads.chosen == machine.computing == 2
    assert machine.used[-2 * LATE :].count(1) <= 4


def test_the_pause_between_trials_in_vain_doubles_up_to_the_longest() -> None:
    machine = Machine(2)
    machine.step(10 * LATE)
    trials = [i for i, threads in enumerate(pairwise(machine.used)) if threads == (2, 1)]
    # A trial itself is a few steps more.
    pauses = [(after - before) // SOON for before, after in pairwise(trials)]
    assert pauses[:6] == [2, 4, 8, 16, LATE // SOON, LATE // SOON]


def test_a_number_of_threads_that_takes_several_times_as_long_is_tried_for_a_single_step() -> None:
    machine = Machine(2)
    machine.seconds = {1: 9.0, 2: 0.75}.__getitem__
    machine.step(SOON + 4)
    assert machine.used.count(1) == 1


def test_beside_a_neighbour_one_is_used_after_a_few_steps_and_all_again_when_it_is_gone() -> None:
    machine = Machine(2)
    machine.step(10 * LATE)
    machine.neighbour()
    machine.step(4)
    assert (machine.threads.chosen, machine.used[-4:]) == (1, [2, 2, 1, 1])
    machine.step(10 * LATE)
    assert machine.used[-2 * LATE :].count(2) <= 4
    machine.seconds = SHARE_OF_ONE.__getitem__
    machine.step(LATE + 4)
    assert machine.threads.chosen == 2


def test_a_neighbour_who_is_there_from_the_start_is_found_as_soon() -> None:
    machine = Machine(2)
    machine.neighbour()
    machine.step(SOON + 4)
    assert machine.threads.chosen == 1


def test_a_neighbour_is_found_as_soon_by_steps_of_a_kind_that_was_not_measured_before() -> None:
    machine = Machine(2)
    machine.step(10 * LATE)
    machine.neighbour()
    machine.step(SOON + 4, kind="other")
    assert machine.threads.chosen == 1


def test_the_best_of_many_is_found() -> None:
    machine = Machine(16)
    machine.step(100)
    assert machine.threads.chosen == 4
    machine.seconds = {1: 1.0, 2: 0.9, 4: 0.8, 8: 0.5, 16: 0.6}.__getitem__
    machine.step(LATE)
    assert machine.threads.chosen == 8


def test_one_step_that_takes_long_changes_nothing() -> None:
    machine = Machine(2)
    for _ in range(20):
        machine.step(20)
        machine.step(size=9)
    assert machine.threads.chosen == 2


def test_steps_of_several_kinds_are_held_against_their_own_kind() -> None:
    machine = Machine(2)
    for _ in range(5 * SOON):
        machine.step(kind="small", size=1)
        machine.step(kind="large", size=50)
    assert machine.used.count(1) < len(machine.used) / 8
    machine.neighbour()
    for _ in range(3):
        machine.step(kind="small", size=1)
        machine.step(kind="large", size=50)
    assert machine.threads.chosen == 1


def test_what_must_not_depend_on_the_neighbours_has_all_of_them() -> None:
    machine = Machine(2)
    machine.neighbour()
    machine.step(2 * SOON)
    with machine.threads.all():
        assert machine.computing == 2
    assert machine.computing == 1


def test_a_step_that_fails_in_a_trial_leaves_the_chosen_number_and_is_tried_again() -> None:
    machine = Machine(2)
    machine.step(SOON + 1)

    def fail(threads: int) -> float:
        raise RuntimeError

    times, machine.seconds = machine.seconds, fail
    with pytest.raises(RuntimeError):
        machine.step()
    assert machine.computing == 2
    machine.seconds = times
    machine.step()
    assert machine.used[-2:] == [1, 1]


def test_where_there_is_nothing_to_choose_nothing_is_changed() -> None:
    machine = Machine(1)
    machine.threads = ThreadTuner(1, lambda _: pytest.fail("changed"), lambda: machine.now)
    machine.step(LATE)
    with machine.threads.all():
        pass
    assert set(machine.used) == {1}


# ── several workers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cores", "workers", "most"), [(2, 2, 1), (8, 2, 4), (8, 3, 2), (2, 3, 1), (1, 2, 1)]
)
def test_each_of_several_workers_computes_with_its_part_of_the_cores(
    cores: int, workers: int, most: int
) -> None:
    computing = [cores]
    threads = SharedThreads(cores, computing.append)
    threads.share(workers)
    assert computing[-1] == most
    with threads.step("kind"):
        assert computing[-1] == most
    with threads.all():
        assert computing[-1] == cores, "roundings must not depend on other workers"
    assert computing[-1] == most
    threads.share(1)
    assert computing[-1] == cores


def test_what_was_chosen_for_a_number_of_workers_is_remembered() -> None:
    computing = [4]
    threads = SharedThreads(4, computing.append)
    threads.tuner.chosen = 2
    threads.share(2)
    threads.tuner.chosen = 1
    threads.share(1)
    assert computing[-1] == 2
    threads.share(2)
    assert computing[-1] == 1


def test_a_share_that_is_no_news_changes_nothing() -> None:
    threads = SharedThreads(4, lambda _: pytest.fail("changed"))
    threads.share(1)


@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_how_long_they_spin(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(said))
    limit_spin_count()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("said", [None, "7"])
def test_kernels_of_few_shapes_are_kept_unless_the_environment_says_how_many(
    monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": said} if said else {})
    limit_kernel_cache()
    assert os.environ["LRU_CACHE_CAPACITY"] == (said or str(KERNEL_CACHE_ENTRIES))


@pytest.mark.parametrize(
    ("said", "installed", "preloaded"),
    [
        (None, "libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4"),
        (None, None, None),
        ("", "libtcmalloc_minimal.so.4", ""),
        ("libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libjemalloc.so.2"),
    ],
)
def test_a_worker_gets_an_installed_tcmalloc_unless_the_environment_preloads_something(
    monkeypatch: pytest.MonkeyPatch, said: str | None, installed: str | None, preloaded: str | None
) -> None:
    before = {"HOME": "/tmp"} | ({} if said is None else {"LD_PRELOAD": said})
    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr(cpu_environment, "faster_allocator", lambda: installed)
    environment = worker_environment()
    assert environment.get("LD_PRELOAD") == preloaded
    # tcmalloc's own lines would stand in a log of JSON.
    assert ("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD" in environment) == (
        said is None and installed is not None
    )
    assert environment["HOME"] == "/tmp"
    assert os.environ == before


@pytest.mark.parametrize(
    ("platform", "there", "found"),
    [
        (
            "linux",
            {"tcmalloc_minimal": "libtcmalloc_minimal.so.4", "tcmalloc": "libtcmalloc.so.4"},
            "libtcmalloc_minimal.so.4",
        ),
        ("linux", {"tcmalloc": "libtcmalloc.so.4"}, "libtcmalloc.so.4"),
        ("linux", {"jemalloc": "libjemalloc.so.2"}, None),
        ("darwin", {"tcmalloc_minimal": "libtcmalloc_minimal.dylib"}, None),
    ],
)
def test_either_tcmalloc_is_found_on_linux_alone(
    monkeypatch: pytest.MonkeyPatch, platform: str, there: dict[str, str], found: str | None
) -> None:
    monkeypatch.setattr(cpu_environment.sys, "platform", platform)
    monkeypatch.setattr(cpu_environment.ctypes.util, "find_library", there.get)
    assert cpu_environment.faster_allocator.__wrapped__() == found
