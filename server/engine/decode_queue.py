"""Decide which rows are decoded next: finished rows before previews, one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.messages import Image
from server.engine.runner import DECODE_ROWS, Decoding
from server.engine.scheduler import Pool, RowId


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """A row's request. preview: its number, None if the row is finished."""

    pool: Pool
    preview: int | None = None


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A row's image after `step` steps.

    preview: its number, None if the row is finished. seconds: the time its batch took.
    """

    row: RowId
    step: int
    preview: int | None
    image: Image
    seconds: float


@dataclass(frozen=True, slots=True)
class _InProgress:
    decoding: Decoding
    requests: dict[RowId, DecodeRequest]
    began: float

    def finish(self) -> list[DecodedImage]:
        images = self.decoding.images()
        seconds = time.perf_counter() - self.began
        rows = zip(self.decoding.rows, self.decoding.steps, images, strict=True)
        return [
            DecodedImage(row, step, self.requests[row].preview, image, seconds)
            for row, step, image in rows
        ]


class DecodeQueue:
    """Rows that wait to be decoded, and the one batch that is being decoded."""

    def __init__(self) -> None:
        self._finished: dict[RowId, DecodeRequest] = {}
        self._previews: dict[RowId, DecodeRequest] = {}
        self._in_progress: list[_InProgress] = []

    @property
    def rows_finished(self) -> int:
        """Rows that have taken all of their steps and are not being decoded yet."""
        return len(self._finished)

    @property
    def rows_in_progress(self) -> list[RowId]:
        """The rows of the batch that is being decoded."""
        return [row for each in self._in_progress for row in each.decoding.rows]

    def add(self, row: RowId, request: DecodeRequest) -> None:
        """Add a row; a preview replaces an earlier one, and a finished row its preview."""
        if request.preview is None:
            self._previews.pop(row, None)
            self._finished[row] = request
        else:
            self._previews[row] = request

    def remove(self, id: str) -> list[RowId]:
        """Forget a job; return its finished rows."""
        for row in [row for row in self._previews if row.job == id]:
            del self._previews[row]
        finished = [row for row in self._finished if row.job == id]
        for row in finished:
            del self._finished[row]
        return finished

    def next_batch(self) -> dict[RowId, DecodeRequest]:
        """Take at most `DECODE_ROWS` rows of one pool; none while a batch is being decoded."""
        if self._in_progress:
            return {}
        return _take_batch(self._finished) or _take_batch(self._previews)

    def start(
        self, requests: dict[RowId, DecodeRequest], decodings: Sequence[Decoding], began: float
    ) -> None:
        """Begin a batch. began: when its decoding was launched, `time.perf_counter` seconds."""
        self._in_progress = [_InProgress(decoding, requests, began) for decoding in decodings]

    def collect(self, *, wait: bool) -> list[DecodedImage]:
        """Return the images of the batch, if it is decoded or `wait` is true."""
        if not wait and not all(each.decoding.mark.passed for each in self._in_progress):
            return []
        decoded = [image for each in self._in_progress for image in each.finish()]
        self._in_progress = []
        return decoded


def _take_batch(waiting: dict[RowId, DecodeRequest]) -> dict[RowId, DecodeRequest]:
    """Remove and return the first row, and those of its pool that may be decoded with it."""
    first = next(iter(waiting.values()), None)
    batch = [row for row, request in waiting.items() if first and request.pool == first.pool][
        :DECODE_ROWS
    ]
    return {row: waiting.pop(row) for row in batch}
