"""Choose how many threads compute a step on a CPU."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

# A step is a thousand small operations, and at the end of each its threads wait for the last of
# them. Beside another busy process, the kernel takes the core of one thread away for milliseconds
# at a time: on two cores two threads then take several times as long as one, though they are faster
# while the machine is otherwise idle. Steps are therefore timed, and other numbers of threads
# tried.

SetThreads = Callable[[int], object]
Clock = Callable[[], float]

# Steps of a trial. The fastest counts, since any single one may have been disturbed.
TRIES = 2
# The ratio of times below which another number of threads is taken.
GAIN = 0.95
# A step that takes this many times as long as before starts a trial: the machine is shared now.
ALARM = 3.0
# Steps between trials: the fewest after a change, doubled after each trial in vain up to the most.
SOON, LATE = 8, 256
# Kinds of steps whose times are remembered.
KINDS = 256


@dataclass
class _Trial:
    """A number of threads that is tried.

    ratios: each step's time divided by that of the chosen number.
    """

    threads: int
    ratios: list[float] = field(default_factory=list)


class ThreadTuner:
    """Choose from 1 to `most` threads by doubling and halving; with one there is nothing to choose.

    set_threads: makes torch compute with this many threads. clock: returns seconds. every: the
    threads of `all`, `most` unless given.
    """

    def __init__(
        self,
        most: int,
        set_threads: SetThreads,
        clock: Clock = time.perf_counter,
        every: int | None = None,
    ) -> None:
        self.chosen = self._used = self._most = most
        self._every = every or most
        self._set_threads, self._clock = set_threads, clock
        # The last times of each kind of step with the chosen number, seconds.
        self._times: dict[Hashable, deque[float]] = {}
        self._trial: _Trial | None = None
        self._wait = self._pause = SOON
        self._upwards = itertools.cycle((False, True))

    @contextmanager
    def step(self, kind: Hashable) -> Iterator[None]:
        """Compute a step with the chosen number, or with one that is tried.

        kind: equal for steps that take equally long.
        """
        times = self._times.get(kind, ())
        trial = self._trial if len(times) == TRIES else None
        with self._with(trial.threads if trial else self.chosen):
            began = self._clock()
            yield
            seconds = self._clock() - began
            if trial:
                self._record_trial(trial, seconds / min(times))
            else:
                self._record_step(kind, seconds)

    @contextmanager
    def all(self) -> Iterator[None]:
        """Compute with every thread: how a sum is split decides how it is rounded."""
        with self._with(self._every):
            yield

    def resume(self) -> None:
        """Compute with the chosen number from now on, whatever others have set."""
        self._used = self.chosen
        self._set_threads(self.chosen)

    @contextmanager
    def _with(self, threads: int) -> Iterator[None]:
        self._set(threads)
        try:
            yield
        finally:
            self._set(self.chosen)

    def _set(self, threads: int) -> None:
        if threads != self._used:
            self._set_threads(threads)
            self._used = threads

    def _record_step(self, kind: Hashable, seconds: float) -> None:
        times = self._times.get(kind)
        if times and seconds > ALARM * min(times):
            self._times.clear()
            self._wait = 0
        elif not times:
            # Steps may have become slow while none of this kind was measured.
            self._wait = min(self._wait, SOON)
        if len(self._times) == KINDS:
            self._times.clear()
        self._times.setdefault(kind, deque(maxlen=TRIES)).append(seconds)
        if self._wait == 0 and self._trial is None and self._most > 1:
            self._trial = _Trial(self._candidate())
        self._wait = max(self._wait - 1, 0)

    def _candidate(self) -> int:
        up, down = min(2 * self.chosen, self._most), max(self.chosen // 2, 1)
        first, second = (up, down) if next(self._upwards) else (down, up)
        return second if first == self.chosen else first

    def _record_trial(self, trial: _Trial, ratio: float) -> None:
        trial.ratios.append(ratio)
        if len(trial.ratios) < TRIES and ratio < ALARM:
            return
        self._trial = None
        if min(trial.ratios) < GAIN:
            self.chosen, self._pause = trial.threads, SOON
            self._times.clear()
        else:
            self._pause = min(2 * self._pause, LATE)
        self._wait = self._pause


class SharedThreads:
    """A CPU's threads, shared by the workers that compute at the same time.

    Workers that each compute with all cores wait for each other at the end of every operation, and
    take several times as long as with a part of the cores each. What is measured is remembered for
    each number of workers, as a `ThreadTuner` does.

    every: threads of the machine. set_threads: makes torch compute with this many.
    """

    def __init__(self, every: int, set_threads: SetThreads) -> None:
        self._every, self._set_threads = every, set_threads
        self._tuners: dict[int, ThreadTuner] = {}
        self.tuner = self._tuner_of(1)

    def _tuner_of(self, workers: int) -> ThreadTuner:
        most = max(1, self._every // workers)
        if most not in self._tuners:
            self._tuners[most] = ThreadTuner(most, self._set_threads, every=self._every)
        return self._tuners[most]

    def share(self, workers: int) -> None:
        """Compute with one of so many parts of the threads from now on."""
        tuner = self._tuner_of(workers)
        if tuner is not self.tuner:
            self.tuner = tuner
            tuner.resume()

    def step(self, kind: Hashable) -> AbstractContextManager[None]:
        """Return the threads of a step: see `ThreadTuner.step`."""
        return self.tuner.step(kind)

    def all(self) -> AbstractContextManager[None]:
        """Return every thread of the machine: see `ThreadTuner.all`."""
        return self.tuner.all()
