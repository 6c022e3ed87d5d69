"""What waits to be decoded, and what is being decoded: finished rows first, then previews, in their order."""

from __future__ import annotations

import time
from dataclasses import dataclass

from server.engine.failure_isolation import Attempts
from server.engine.messages import Image
from server.engine.runner import DECODE_ROWS, Decoding, Runner
from server.engine.scheduler import Pool, RowId


@dataclass(frozen=True, slots=True)
class Due:
    """What a row waits for. preview: its number, None if the row is finished."""

    pool: Pool
    preview: int | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row's picture after so many steps. preview: its number, None if the row is finished. seconds: what its batch took."""

    row: RowId
    step: int
    preview: int | None
    image: Image
    seconds: float


@dataclass(frozen=True, slots=True)
class _Underway:
    decoding: Decoding
    due: dict[RowId, Due]
    began: float

    def finish(self) -> list[Decoded]:
        images = self.decoding.images()
        seconds = time.perf_counter() - self.began
        rows = zip(self.decoding.rows, self.decoding.steps, images, strict=True)
        return [Decoded(row, step, self.due[row].preview, image, seconds) for row, step, image in rows]


class Decoder:
    """At most one decode is under way."""

    def __init__(self, runner: Runner, attempt: Attempts) -> None:
        self._runner, self._attempt = runner, attempt
        self._finished: dict[RowId, Due] = {}
        self._previews: dict[RowId, Due] = {}
        self._underway: list[_Underway] = []

    @property
    def rows_finished(self) -> int:
        """Rows that are through with their steps and not decoded."""
        return len(self._finished)

    @property
    def rows_underway(self) -> list[RowId]:
        return [row for underway in self._underway for row in underway.decoding.rows]

    def add(self, row: RowId, due: Due) -> None:
        """A preview takes the place of an earlier one that was not made, and comes too late once its row is finished."""
        if due.preview is None:
            self._previews.pop(row, None)
            self._finished[row] = due
        else:
            self._previews[row] = due

    def remove(self, id: str) -> list[RowId]:
        """Forgets a job; returns its finished rows."""
        for row in [row for row in self._previews if row.job == id]:
            del self._previews[row]
        finished = [row for row in self._finished if row.job == id]
        for row in finished:
            del self._finished[row]
        return finished

    def turn(self, *, idle: bool) -> list[Decoded]:
        """Begins one decode and returns what is decoded; idle: no step waits, so all that is finished is decoded at once."""
        decoded = self._turn(idle)
        while idle and self._finished:
            decoded += self._turn(idle)
        return decoded

    def _turn(self, idle: bool) -> list[Decoded]:
        if not self._underway:
            self._begin(_take_batch(self._finished) or _take_batch(self._previews))
        if not idle and not all(underway.decoding.mark.passed for underway in self._underway):
            return []
        decoded = [each for underway in self._underway for each in underway.finish()]
        self._underway = []
        self._runner.drop([each.row for each in decoded if each.preview is None])
        return decoded

    def _begin(self, due: dict[RowId, Due]) -> None:
        began = time.perf_counter()
        decodings = self._attempt(list(due), lambda rows: [self._runner.decode(due[rows[0]].pool.model, rows)]) if due else []
        self._underway = [_Underway(decoding, due, began) for decoding in decodings]
        begun = set(self.rows_underway)
        self._runner.drop([row for row in due if row not in begun])  # their jobs have failed


def _take_batch(waiting: dict[RowId, Due]) -> dict[RowId, Due]:
    """The first row, and those of its pool that may be decoded with it."""
    first = next(iter(waiting.values()), None)
    batch = [row for row, due in waiting.items() if first and due.pool == first.pool][:DECODE_ROWS]
    return {row: waiting.pop(row) for row in batch}
