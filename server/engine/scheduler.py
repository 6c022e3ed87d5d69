"""Decide which rows start and which rows step next. Pure Python, no torch, no clock.

A row is one image of a job, or one tile of an image. Rows that can share a denoiser step form a
pool, which steps its running rows together, so rows join and leave at every step. A pool
with interactive rows goes before one without, then the one with the row that arrived first, but
none waits for more than `PATIENCE` steps of others (and once for each other pool that has waited as
long). Where a step takes longer the more rows it has, a pool's batch rows let its interactive ones
step without them, as patiently. Waiting rows get free slots in the same order, with a share of the
slots and of the turns reserved for either priority.

Deadlines decide nothing here: a client that allows more time than others would wait until no others
arrive, and one that allows less would pass everybody.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from model.config import DENOISER
from server.engine.job import Job, Priority

# Steps of other pools between two of one pool, at most: two pools share the steps three to one at
# worst. A pool's batch rows take part in its next step after as many.
PATIENCE = 3

# While both priorities wait, every fifth freed slot goes to a batch row, but only to one that has
# waited for longer than every interactive row: batch is never the faster way. Batch rows leave a
# quarter of the slots to interactive ones.
BATCH_TURN = 5
INTERACTIVE_SHARE = 4

# Rows started between two steps while others run, so that no step waits for more encoding than
# that.
STARTS = 4

# Classes of condition lengths, in bytes, end mark included. A step pads its rows' conditions to the
# longest: a prompt of 20 bytes should not pay for a neighbour of 700 in every attention block, but
# pools as narrow as the encoder's ten buckets would leave most steps with a single row.
LENGTHS = (96, 256, 768)


@dataclass(frozen=True, slots=True)
class RowId:
    """Row `index` of a job."""

    job: str
    index: int


@dataclass(frozen=True, slots=True)
class Pool:
    """The properties that rows must share to step together.

    length: the class of their conditions, one of LENGTHS. The encoder's own count is known only
    once a job has started, but it reads bytes, so the text tells as much. reserved_for: the job
    whose rows step alone, or the row that does; None where others may join. denoiser: the network
    that takes the steps, by its name; presets that share it share steps.
    """

    model: str
    width: int
    height: int
    length: int
    reserved_for: RowId | str | None
    denoiser: str = DENOISER

    @classmethod
    def of(cls, job: Job, index: int) -> Pool:
        """Return the pool of row `index` of a job."""
        reserved_for: RowId | str | None = job.id if job.alone else None
        # A step's arithmetic may round differently at another batch size, so a deterministic row's
        # steps hold nothing but itself.
        if job.sampling.deterministic:
            reserved_for = RowId(job.id, index)
        denoiser = job.sampling.denoiser
        return cls(job.model, *job.row_size(index), _length(job), reserved_for, denoiser)


@dataclass(slots=True)
class _Running:
    """A pool's running rows.

    waited: steps of other pools since its last one. batch_waited: steps since the last one that had
    all of its rows.
    """

    rows: list[RowId] = field(default_factory=list)
    waited: int = 0
    batch_waited: int = 0


class Scheduler:
    """Give rows at most `max_rows` running slots, and choose the rows that step next."""

    def __init__(self, max_rows: int, *, batch_waits: bool = True) -> None:
        """Create the scheduler.

        batch_waits: interactive rows step without the batch rows of their pool. False where more
        rows hardly lengthen a step, and batch rows would only hold their slots for longer.
        """
        self.max_rows, self._batch_waits = max_rows, batch_waits
        self._jobs: dict[str, Job] = {}
        self._arrivals = count()
        # By the job's arrival, then the row's.
        self._waiting: dict[Priority, list[tuple[float, int, RowId]]] = {
            "interactive": [],
            "batch": [],
        }
        self._passed_over = 0
        self._running: dict[Pool, _Running] = {}

    def add(self, job: Job) -> None:
        """Add a job; the rows of its first pass wait for slots."""
        self._jobs[job.id] = job
        self.add_rows(job.id, job.passes[0][0])

    def add_rows(self, id: str, rows: Iterable[int]) -> None:
        """Let more rows of a job wait for slots, in the place of its arrival."""
        job = self._jobs[id]
        for i in rows:
            entry = (job.arrived_at, next(self._arrivals), RowId(id, i))
            insort(self._waiting[job.priority], entry)

    def update(self, job: Job) -> None:
        """Replace a job by one that differs in the sources of its tiles."""
        self._jobs[job.id] = job

    def job(self, id: str) -> Job:
        """Return a job by its id."""
        return self._jobs[id]

    def pool(self, row: RowId) -> Pool:
        """Return a row's pool."""
        return Pool.of(self._jobs[row.job], row.index)

    @property
    def rows_running(self) -> int:
        """Rows with a slot."""
        return sum(len(running.rows) for running in self._running.values())

    @property
    def rows_waiting(self) -> int:
        """Rows without a slot."""
        return sum(map(len, self._waiting.values()))

    @property
    def idle(self) -> bool:
        """Return whether there is no job."""
        return not self._jobs

    def expired(self, now: float) -> list[str]:
        """Return the jobs whose deadline has passed."""
        return [id for id, job in self._jobs.items() if job.deadline <= now]

    # ── slots ─────────────────────────────────────────────────────────────────────────────────────

    def admit(self, finished: int = 0) -> list[RowId]:
        """Move waiting rows into free slots, and return them, to be started before the next step.

        No more than `STARTS` if others run. finished: rows that are not decoded yet, and take slots
        until they are.
        """
        admitted: list[RowId] = []
        free = self.max_rows - self.rows_running - finished
        at_most = min(free, STARTS) if self._running else free
        while len(admitted) < at_most and (row := self._next_waiting()):
            self._running.setdefault(self.pool(row), _Running()).rows.append(row)
            admitted.append(row)
        return admitted

    def _next_waiting(self) -> RowId | None:
        interactive, batch = self._waiting["interactive"], self._waiting["batch"]
        most = self.max_rows - self.max_rows // INTERACTIVE_SHARE
        batch_may = bool(batch) and self._batch_running < most
        batch_turn = self._passed_over >= BATCH_TURN - 1
        if batch_may and (not interactive or (batch_turn and batch[0] < interactive[0])):
            self._passed_over = 0
            return batch.pop(0)[-1]
        self._passed_over += batch_may
        return interactive.pop(0)[-1] if interactive else None

    @property
    def _batch_running(self) -> int:
        rows = [row for running in self._running.values() for row in running.rows]
        return len(rows) - len(self._interactive(rows))

    def _interactive(self, rows: list[RowId]) -> list[RowId]:
        return [row for row in rows if self._jobs[row.job].priority == "interactive"]

    def finish(self, row: RowId) -> None:
        """Free a row's slot."""
        pool = self.pool(row)
        self._running[pool].rows.remove(row)
        if not self._running[pool].rows:
            del self._running[pool]

    def remove(self, id: str) -> list[RowId]:
        """Forget a job, finished or not; return its running rows.

        An unknown id is no error, since a cancellation may be late.
        """
        if id not in self._jobs:
            return []
        for waiting in self._waiting.values():
            waiting[:] = [entry for entry in waiting if entry[-1].job != id]
        rows = [row for running in self._running.values() for row in running.rows if row.job == id]
        for row in rows:
            self.finish(row)
        del self._jobs[id]
        return rows

    # ── turns ─────────────────────────────────────────────────────────────────────────────────────

    def next_rows(self) -> list[RowId]:
        """Return rows of the next pool, to be stepped together; none if nothing runs."""
        if not self._running:
            return []
        chosen = self._running[self._next_pool()]
        for running in self._running.values():
            running.waited += 1
            running.batch_waited += 1
        chosen.waited = 0
        interactive = self._interactive(chosen.rows)
        if (
            self._batch_waits
            and 0 < len(interactive) < len(chosen.rows)
            and chosen.batch_waited <= PATIENCE
        ):
            return interactive
        chosen.batch_waited = 0
        return list(chosen.rows)

    def _next_pool(self) -> Pool:
        longest = max(self._running, key=lambda pool: self._running[pool].waited)
        if self._running[longest].waited >= PATIENCE:
            return longest
        return min(self._running, key=self._urgency)

    def _urgency(self, pool: Pool) -> tuple[bool, float, int]:
        """Return a key that is smaller for a more urgent pool."""
        running = self._running[pool]
        arrived_at = min(self._jobs[row.job].arrived_at for row in running.rows)
        return not self._interactive(running.rows), arrived_at, -running.waited


def _length(job: Job) -> int:
    return next((length for length in LENGTHS if job.text_bytes < length), LENGTHS[-1])
