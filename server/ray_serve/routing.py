"""Which replica should be asked, and how many there should be. Nothing here knows of Ray."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from server.engine.costs import Pace
from server.engine.protocol import Job

# A picture of 256 × 256, twelve guided steps: pixels times steps times branches.
UNIT = 256 * 256 * 12 * 2

Replica = TypeVar("Replica", bound=Hashable)


def units(job: Job) -> float:
    """What the job costs, in standard pictures."""
    return len(job.seeds) * job.width * job.height * job.sampling.steps * job.branches / UNIT


def replicas_for(rows: float, target_rows: float) -> int:
    """How many replicas hold so many unfinished images with at most `target_rows` each."""
    return math.ceil(rows / target_rows)


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica says of itself. units: unfinished, by who sent them. seconds_per_unit: None before its first answer."""

    ready: bool = True
    units: Mapping[str, float] = field(default_factory=dict)
    seconds_per_unit: float | None = None


class Meter:
    """A replica's own load, kept as jobs come and go."""

    def __init__(self) -> None:
        self._unfinished: defaultdict[str, float] = defaultdict(float)
        self._pace: Pace | None = None

    def begin(self, sender: str, job: Job) -> Callable[[bool], None]:
        """Counts the job until the returned function is called, with whether it was done."""
        size, began = units(job), time.monotonic()
        self._unfinished[sender] += size

        def end(done: bool) -> None:
            self._unfinished[sender] -= size
            if done:
                self._pace = self._pace or Pace(seconds=0.0, rows=0.0, last_finish=began)
                self._pace.record(size, began)

        return end

    def load(self, ready: bool) -> Load:
        return Load(ready, dict(self._unfinished), self._pace.seconds_per_row if self._pace else None)


@dataclass(frozen=True, slots=True)
class _Sent:
    replica: Hashable
    units: float
    deadline: float


class Waits:
    """One sender's view of all replicas: what it sent itself to the moment, what others sent as the replicas said last."""

    def __init__(self, sender: str) -> None:
        self._sender = sender
        self._sent: dict[str, _Sent] = {}

    def ranked(self, replicas: Sequence[Replica], loads: Mapping[Replica, Load], job: Job) -> list[Replica]:
        """Those by which the job should be done first come first; equals in any order, those that are not ready last."""
        speeds = [load.seconds_per_unit for load in loads.values() if load.seconds_per_unit is not None]
        # Nothing is known of a new one: it is as fast as the fastest, so that it is tried.
        default = min(speeds, default=1.0)

        def finish(replica: Replica) -> tuple[bool, float, float]:
            load = loads.get(replica, Load())
            ahead = self._own(replica) + sum(size for sender, size in load.units.items() if sender != self._sender)
            speed = default if load.seconds_per_unit is None else load.seconds_per_unit
            return not load.ready, speed * (ahead + units(job)), random.random()

        return sorted(replicas, key=finish)

    def send(self, id: str, replica: Hashable, job: Job) -> None:
        """Counts the job for the replica, and for no other any more, until it is completed or its deadline has passed."""
        self._sent[id] = _Sent(replica, units(job), job.deadline)

    def complete(self, id: str, replica: Hashable) -> None:
        if (sent := self._sent.get(id)) and sent.replica == replica:
            del self._sent[id]

    def _own(self, replica: Hashable) -> float:
        now = time.monotonic()
        self._sent = {id: sent for id, sent in self._sent.items() if sent.deadline > now}
        return sum(sent.units for sent in self._sent.values() if sent.replica == replica)
