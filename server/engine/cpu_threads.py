"""How many threads compute a worker's steps on a CPU: as many as are fastest just now.

A step is a thousand small operations, and at the end of each its threads wait for the last of them. Beside another busy process that is one
whose core the kernel has given away, for milliseconds at a time: on two cores two threads then take several times as long as one, though
they are faster as long as nobody else computes. Nobody says when that changes, so steps are timed, and other numbers tried.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Use = Callable[[int], object]
Clock = Callable[[], float]

# The fastest of so many steps counts: any single one may have been disturbed.
TRIES = 2
# What another number of threads must save to be taken.
GAIN = 0.95
# A step that takes so many times as long as it did: the cores are not what they were. The first one after a pause takes twice as long.
ALARM = 3.0
# Steps between trials: the fewest after a change, then ever more.
SOON, LATE = 8, 256
# Kinds of steps whose times are remembered.
KINDS = 256


def _set_torch_threads(threads: int) -> None:
    # Imported here: the supervisor, which has no torch, imports this module too.
    import torch

    torch.set_num_threads(threads)


@dataclass
class Trial:
    """shares: of the time that the chosen number of threads takes, one for each step."""

    threads: int
    shares: list[float] = field(default_factory=list)


class ThreadTuner:
    """From 1 to `most`; doubled and halved in turn to see what that does. With one there is nothing to choose, and nothing is changed.

    use: makes torch compute with so many from then on. clock: seconds.
    """

    def __init__(self, most: int, use: Use = _set_torch_threads, clock: Clock = time.perf_counter) -> None:
        self.chosen = self._used = self._most = most
        self._use, self._clock = use, clock
        # The last times of each kind of step with the chosen number, seconds.
        self._times: dict[Hashable, deque[float]] = {}
        self._trial: Trial | None = None
        self._wait = self._pause = SOON
        self._upwards = itertools.cycle((False, True))

    @contextmanager
    def step(self, kind: Hashable) -> Iterator[None]:
        """Computes a step with the chosen number, or with one that is tried. kind: equal for steps that take equally long."""
        times = self._times.get(kind, ())
        trial = self._trial if len(times) == TRIES else None
        with self._with(trial.threads if trial else self.chosen):
            began = self._clock()
            yield
            seconds = self._clock() - began
            if trial:
                self._tried(trial, seconds / min(times))
            else:
                self._stepped(kind, seconds)

    @contextmanager
    def all(self) -> Iterator[None]:
        """Computes with as many as there are: sums are rounded by how they are shared out, and some must not depend on the neighbours."""
        with self._with(self._most):
            yield

    @contextmanager
    def _with(self, threads: int) -> Iterator[None]:
        self._set(threads)
        try:
            yield
        finally:
            self._set(self.chosen)

    def _set(self, threads: int) -> None:
        if threads != self._used:
            self._use(threads)
            self._used = threads

    def _stepped(self, kind: Hashable, seconds: float) -> None:
        times = self._times.get(kind)
        if times and seconds > ALARM * min(times):
            self._times.clear()
            self._wait = 0
        elif not times:
            # It may have become slow unseen.
            self._wait = min(self._wait, SOON)
        if len(self._times) == KINDS:
            self._times.clear()
        self._times.setdefault(kind, deque(maxlen=TRIES)).append(seconds)
        if self._wait == 0 and self._trial is None and self._most > 1:
            self._trial = Trial(self._candidate())
        self._wait = max(self._wait - 1, 0)

    def _candidate(self) -> int:
        up, down = min(2 * self.chosen, self._most), max(self.chosen // 2, 1)
        first, second = (up, down) if next(self._upwards) else (down, up)
        return second if first == self.chosen else first

    def _tried(self, trial: Trial, share: float) -> None:
        trial.shares.append(share)
        if len(trial.shares) < TRIES and share < ALARM:
            return
        self._trial = None
        if min(trial.shares) < GAIN:
            self.chosen, self._pause = trial.threads, SOON
            self._times.clear()
        else:
            self._pause = min(2 * self._pause, LATE)
        self._wait = self._pause


# Measured: fewer make an undisturbed step longer, more a disturbed one (docs/log.md).
SPINS = 10_000


def limit_spin_count() -> None:
    """Before torch is imported: lets threads that wait go to sleep sooner, unless the environment has a say in it.

    Undisturbed they do not get there. By default they spin for longer than the kernel lets a neighbour compute, and take from each other
    what they wait for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
