"""Predict a job's latency from measured step times, to reject a job that would be late at once.

A prediction is likely or least. The likely one, which clients are told, scales measurements to
sizes and numbers of branches that were not measured. The least one never scales them up, and
assumes that what was never measured takes no time: only it may reject a job.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from model.config import DENOISER
from server.engine.job import Job
from server.engine.messages import Step, Timings
from server.engine.scheduler import Pool

T = TypeVar("T")

# Older measurements reject no job: one slow step on an idle server would otherwise reject all that
# follow.
MEMORY_S = 60.0
# The weight of the latest value in an average.
WEIGHT = 0.2


@dataclass(slots=True)
class _Average:
    """A moving average of about five values. at: time of the latest, monotonic seconds."""

    value: float
    at: float

    def record(self, value: float, now: float) -> None:
        """Add a value."""
        self.value += WEIGHT * (value - self.value)
        self.at = now


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of an admitted job.

    position: rows that must be done before its first can start. seconds: until it should be done.
    """

    position: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """An unfinished job. left: steps that all of its rows together have yet to take."""

    job: Job
    left: int

    @property
    def rows(self) -> int:
        return self.job.rows

    def passes(self) -> Iterator[tuple[range, int]]:
        """Yield each pass that is not over: its rows, and the steps that they have yet to take."""
        left = self.left
        for rows, steps in reversed(self.job.passes):
            own = min(left, len(rows) * steps)
            left -= own
            if own:
                yield rows, own


class _Kind(NamedTuple):
    """What measurements are kept apart by. pixels: width times height of a row.

    tiled: whether the rows are tiles, which share the prior's result and more. denoiser: the
    network's name. preset: of a job, because its prior may take more steps or fewer than another's.
    """

    model: str
    pixels: int
    tiled: bool = False
    denoiser: str = DENOISER
    preset: str = ""

    @property
    def weights(self) -> tuple[str, str, str, bool]:
        """What measurements of other sizes must share to be scaled to this one."""
        return self.model, self.denoiser, self.preset, self.tiled

    @classmethod
    def of(cls, job: Job) -> _Kind:
        """Return the kind of a job's last pass."""
        width, height = job.row_size(job.passes[-1][0][0])
        tiled, sampling = job.enlarge is not None, job.sampling
        return cls(job.model, width * height, tiled, sampling.denoiser, sampling.preset)


@dataclass(slots=True)
class LatencyModel:
    """Averages of a step's seconds, by weights, image size and branches; of a row's other seconds.

    measured_at: time of the last step that was recorded, monotonic seconds.
    """

    measured_at: float = -math.inf
    _steps: dict[_Kind, dict[int, _Average]] = field(default_factory=dict)
    _overhead: dict[_Kind, _Average] = field(default_factory=dict)

    def record_step(self, step: Step, now: float) -> None:
        """Record a finished step."""
        self.measured_at = now
        kind = _Kind(step.model, step.pixels, denoiser=step.denoiser)
        known = self._steps.setdefault(kind, {})
        known.setdefault(step.branches, _Average(step.seconds, now)).record(step.seconds, now)

    def record_job(self, job: Job, timings: Timings, now: float) -> None:
        """Record the time of a finished job outside its steps."""
        seconds = (timings.encode + timings.prior + timings.decode) / job.rows
        kind = _Kind.of(job)
        self._overhead.setdefault(kind, _Average(seconds, now)).record(seconds, now)

    def predict(
        self,
        job: Job,
        others: Sequence[Job],
        slots: int,
        now: float,
        left: Mapping[str, int] | None = None,
        *,
        least: bool = False,
    ) -> float | None:
        """Return the seconds from now until `job` is done while `others` are unfinished.

        Returns None while too little is known. left: of started jobs, the steps that all of their
        rows have yet to take. least: predict what the measurements prove, without any that is
        scaled up; 0 where they prove nothing.

        While the running rows take turns, a round costs one step of every pool. A row without a
        free slot waits until enough of the rows before it are done. A row with fewer steps to go
        than the job delays it in that share of its rounds.
        """
        unfinished = [
            _Unfinished(other, (left or {}).get(other.id, other.row_steps)) for other in others
        ]
        unfinished = [each for each in unfinished if each.left]
        everything = [*unfinished, _Unfinished(job, job.row_steps)]
        rows = sum(each.rows for each in everything)
        waiting = sum(each.left for each in everything) / rows * max(0, rows - slots) / slots
        rounds = job.steps + waiting
        # A job that takes no step, and waits for no other's, has no round.
        seconds = self._seconds_per_round(everything, rounds, slots, now, least) if rounds else 0.0
        if seconds is None:
            return None
        overhead = sum(each.rows * self._around(each.job, now, least) for each in everything)
        return rounds * seconds + overhead

    def _around(self, job: Job, now: float, least: bool) -> float:
        """Return the seconds of one of the job's rows outside its steps; 0 while unknown."""
        recent = {
            kind: average.value
            for kind, average in self._overhead.items()
            if now - average.at < MEMORY_S
        }
        kind = _Kind.of(job)
        return _for_kind(recent, kind, lambda seconds: seconds, least) or 0.0

    def _seconds_per_round(
        self, jobs: Sequence[_Unfinished], rounds: float, slots: int, now: float, least: bool
    ) -> float | None:
        present: dict[Pool, float] = defaultdict(float)
        branches: dict[Pool, float] = defaultdict(float)
        parts = [(each, rows, left) for each in jobs for rows, left in each.passes()]
        for each, rows, left in parts:
            share = min(1.0, left / len(rows) / rounds)
            # All rows of a pass share a pool, unless each is a pool of its own.
            alone = each.job.sampling.deterministic
            for first, count in ((i, 1) for i in rows) if alone else ((rows[0], len(rows)),):
                pool = Pool.of(each.job, first)
                present[pool] += share * count
                branches[pool] += share * count * each.job.row_branches(first)
        running = min(1.0, slots / sum(present.values()))
        seconds = [
            self._round(pool, count * running, branches[pool] / count, now, least)
            for pool, count in present.items()
            if count
        ]
        return (
            None if any(each is None for each in seconds) else sum(each or 0.0 for each in seconds)
        )

    def _round(
        self, pool: Pool, rows: float, branches: float, now: float, least: bool
    ) -> float | None:
        """Return the seconds of a step of so many rows; of less than one row, its share of a step.

        branches: of each row.
        """
        pixels = pool.width * pool.height
        branches *= max(1.0, rows)
        seconds = self.step(pool.model, pixels, branches, now, denoiser=pool.denoiser, least=least)
        return None if seconds is None else seconds * min(1.0, rows)

    def step(
        self,
        model: str,
        pixels: int,
        branches: float,
        now: float,
        *,
        denoiser: str = DENOISER,
        least: bool = False,
    ) -> float | None:
        """Return the seconds of a step of so many branches; None while nothing is known.

        Interpolated between measured numbers; in proportion beyond them, for other sizes and for
        other weights, but never scaled up for the least prediction.
        """
        recent = {
            kind: {
                count: average.value
                for count, average in known.items()
                if now - average.at < MEMORY_S
            }
            for kind, known in self._steps.items()
        }
        measured = {kind: known for kind, known in recent.items() if known}
        if not measured:
            return None
        kind = _Kind(model, pixels, denoiser=denoiser)
        return _for_kind(measured, kind, lambda known: _interpolate(known, branches, least), least)


def _for_kind(
    measured: Mapping[_Kind, T], kind: _Kind, seconds: Callable[[T], float], least: bool
) -> float | None:
    """Return the seconds of the nearest measured size, of the same weights if there is one, scaled.

    least: 0 if nothing of these weights was measured, and no more than was measured. Tiles, and
    another denoiser or preset of a bundle, are others' weights in this respect.
    """
    same = [other for other in measured if other.weights == kind.weights]
    if least and not same:
        return 0.0
    nearest = min(same or measured, key=lambda other: abs(other.pixels - kind.pixels), default=None)
    if nearest is None:
        return None
    scale = kind.pixels / nearest.pixels
    return seconds(measured[nearest]) * (min(1.0, scale) if least else scale)


def _interpolate(known: dict[int, float], branches: float, least: bool) -> float:
    counts = sorted(known)
    i = bisect_left(counts, branches)
    if i == 0 or i == len(counts):
        closest = counts[min(i, len(counts) - 1)]
        scale = branches / closest
        return known[closest] * (min(1.0, scale) if least else scale)
    low, high = counts[i - 1], counts[i]
    return known[low] + (known[high] - known[low]) * (branches - low) / (high - low)
