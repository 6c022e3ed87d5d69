"""Choice of the replica for a job, and of the number of replicas. Independent of Ray."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from server.engine.job import Job
from server.pace import Pace

# An image of 256 × 256 in twelve guided steps: pixels times steps times branches.
UNIT = 256 * 256 * 12 * 2

Replica = TypeVar("Replica", bound=Hashable)


def work_units(job: Job) -> float:
    """Return the job's work in standard images."""
    return job.work / UNIT


def replicas_for(rows: float, target_rows: float) -> int:
    """Return the number of replicas that have at most `target_rows` unfinished images each."""
    return math.ceil(rows / target_rows)


@dataclass(frozen=True, slots=True)
class Load:
    """The load that a replica reports.

    Attributes:
        ready: whether a worker is ready.
        units: unfinished work by sender.
        seconds_per_unit: None before the first finished job.
    """

    ready: bool = True
    units: Mapping[str, float] = field(default_factory=dict)
    seconds_per_unit: float | None = None


class LoadMeter:
    """Measures a replica's own load."""

    def __init__(self) -> None:
        self._unfinished: defaultdict[str, list[float]] = defaultdict(list)
        self._pace: Pace | None = None

    def begin(self, sender: str, job: Job) -> Callable[[bool], None]:
        """Count the job until the returned function is called with whether it was finished."""
        units = work_units(job)
        began = time.monotonic()
        self._unfinished[sender].append(units)

        def end(finished: bool) -> None:
            self._unfinished[sender].remove(units)
            if not self._unfinished[sender]:
                del self._unfinished[sender]
            if finished:
                self._pace = self._pace or Pace(seconds=0.0, units=0.0, last_finish=began)
                self._pace.record(units, began)

        return end

    def load(self, ready: bool) -> Load:
        """Return the current load."""
        seconds_per_unit = self._pace.seconds_per_unit if self._pace else None
        units = {sender: sum(jobs) for sender, jobs in self._unfinished.items()}
        return Load(ready, units, seconds_per_unit)


@dataclass(frozen=True, slots=True)
class _Assignment:
    replica: Hashable
    units: float
    deadline: float


class WaitEstimator:
    """One sender's estimate of the replicas' waits.

    It knows its own jobs exactly, and those of other senders from the replicas' last reports.
    """

    def __init__(self, sender: str) -> None:
        self._sender = sender
        self._assignments: dict[str, _Assignment] = {}

    def rank(
        self, replicas: Sequence[Replica], loads: Mapping[Replica, Load], job: Job
    ) -> list[Replica]:
        """Return the replicas by expected finish of the job, unready ones last.

        Equal replicas are in random order.
        """
        known = [load.seconds_per_unit for load in loads.values()]
        speeds = [speed for speed in known if speed is not None]
        # A new replica counts as fast as the fastest, so that it is tried.
        default = min(speeds, default=1.0)

        def finish(replica: Replica) -> tuple[bool, float, float]:
            load = loads.get(replica, Load())
            others = sum(size for sender, size in load.units.items() if sender != self._sender)
            ahead = self._assigned_units(replica) + others
            speed = default if load.seconds_per_unit is None else load.seconds_per_unit
            return not load.ready, speed * (ahead + work_units(job)), random.random()

        return sorted(replicas, key=finish)

    def assign(self, id: str, replica: Hashable, job: Job) -> None:
        """Count the job for this replica alone, until it is completed or its deadline passes."""
        self._assignments[id] = _Assignment(replica, work_units(job), job.deadline)

    def complete(self, id: str, replica: Hashable) -> None:
        """Stop counting the job, unless it was assigned to another replica since."""
        assignment = self._assignments.get(id)
        if assignment and assignment.replica == replica:
            del self._assignments[id]

    def _assigned_units(self, replica: Hashable) -> float:
        now = time.monotonic()
        self._assignments = {
            id: assignment
            for id, assignment in self._assignments.items()
            if assignment.deadline > now
        }
        assigned = self._assignments.values()
        return sum(assignment.units for assignment in assigned if assignment.replica == replica)
