"""What is decoded when: finished rows before previews, few at once, and one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from server.engine.cuda_streams import Mark
from server.engine.decode_queue import DecodeQueue, DecodeRequest
from server.engine.runner import DECODE_ROWS, Decoding
from server.engine.scheduler import Pool, RowId

POOL = Pool("random", 2, 2, 96, None)


class LateMark(Mark):
    """A decode that is done once `passed` is set."""

    passed = False

    def __init__(self) -> None:
        super().__init__(None)


def decoding(rows: Sequence[RowId], mark: Mark | None = None) -> Decoding:
    pixels = torch.zeros(len(rows), 2, 2, 3, dtype=torch.uint8)
    return Decoding(tuple(rows), (1,) * len(rows), pixels, mark or Mark(None))


def turn(queue: DecodeQueue) -> list[tuple[RowId, int | None]]:
    """Decode the next batch at once; return its rows and previews."""
    batch = queue.next_batch()
    queue.start(batch, [decoding(list(batch))] if batch else [], 0.0)
    return [(each.row, each.preview) for each in queue.collect(wait=False)]


def test_finished_rows_go_first_and_a_late_preview_gives_way_to_the_next() -> None:
    queue = DecodeQueue()
    early, busy, done = (RowId(id, 0) for id in ("early", "busy", "done"))
    for number in range(3):
        queue.add(busy, DecodeRequest(POOL, number))
    queue.add(early, DecodeRequest(replace(POOL, width=4), 0))
    queue.add(done, DecodeRequest(POOL, 0))
    queue.add(done, DecodeRequest(POOL))
    assert turn(queue) == [(done, None)]
    assert turn(queue) == [(busy, 2)]
    assert queue.remove("early") == []
    assert turn(queue) == []


def test_a_batch_is_bounded_and_of_one_pool() -> None:
    queue = DecodeQueue()
    queue.add(RowId("other", 0), DecodeRequest(replace(POOL, width=4)))
    for i in range(2 * DECODE_ROWS):
        queue.add(RowId("a", i), DecodeRequest(POOL))
    assert [row for row, _ in turn(queue)] == [RowId("other", 0)]
    assert [row.index for row, _ in turn(queue)] == list(range(DECODE_ROWS))
    assert queue.rows_finished == DECODE_ROWS


def test_no_batch_begins_while_one_is_being_decoded() -> None:
    queue, mark = DecodeQueue(), LateMark()
    first, second = RowId("first", 0), RowId("second", 0)
    queue.add(first, DecodeRequest(POOL))
    batch = queue.next_batch()
    queue.start(batch, [decoding([first], mark)], 0.0)
    queue.add(second, DecodeRequest(POOL))
    assert queue.next_batch() == {}
    assert queue.collect(wait=False) == []
    assert queue.rows_in_progress == [first]
    mark.passed = True
    assert [each.row for each in queue.collect(wait=False)] == [first]
    assert list(queue.next_batch()) == [second]


@pytest.mark.parametrize("preview", [None, 0])
def test_a_removed_job_is_not_decoded_and_its_finished_rows_are_returned(
    preview: int | None,
) -> None:
    queue, row = DecodeQueue(), RowId("a", 0)
    queue.add(row, DecodeRequest(POOL, preview))
    assert queue.remove("a") == ([row] if preview is None else [])
    assert queue.next_batch() == {}
