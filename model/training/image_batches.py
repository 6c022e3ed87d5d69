"""Load batches of the user's captioned images, at the size that a bundle is trained at.

Unusable files are left out and counted by reason. The seed, the epoch and the index in it determine
everything random, so those two numbers are the position of a training, whatever number of threads
reads ahead.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.training.captioned import Collection, DataError, Record
from model.training.decoding import Filters, Unusable, decode
from model.training.processes import rank
from model.training.report import by_reason

S = TypeVar("S")
T = TypeVar("T")
_Place = tuple[int, int, Record | Unusable]  # epoch, index in it, what is there
_CaptionedImage = tuple[Tensor, str]


class ImageBatches:
    """Draw `count` captioned images at a time from a collection, over and over.

    size: (width, height) in pixels. threads: the number of threads that decode ahead; 0 decodes on
    demand.
    """

    def __init__(
        self,
        collection: Collection,
        count: int,
        size: tuple[int, int],
        filters: Filters,
        *,
        seed: int = 0,
        threads: int = 0,
    ) -> None:
        self.collection = collection
        self.count = count
        self.size = size
        self.filters = filters
        self.seed = seed
        self.threads = threads
        self.identity = collection.identity
        self.skipped = Counter[
            str
        ]()  # by reason, in the first epoch: later ones meet the same files
        self._restart(0, 0)

    def _restart(self, epoch: int, index: int) -> None:
        self._begin_epoch(epoch, index)
        self._outcomes = in_order(self._load, self._places(epoch, index), self.threads)

    def _begin_epoch(self, epoch: int, index: int = 0) -> None:
        self._epoch = epoch
        self._index = index
        self._whole = index == 0
        self._usable, self._unusable = 0, Counter[str]()

    def draw(self) -> tuple[Tensor, list[str]]:
        """Return (uint8 [count, 3, H, W], `count` captions).

        Raises DataError if a whole epoch holds no usable image.
        """
        images, captions = zip(*islice(self._images(), self.count), strict=True)
        return torch.stack(images), list(captions)

    def _images(self) -> Iterator[_CaptionedImage]:
        for outcome in self._outcomes:
            if outcome is None:
                self._end_epoch()
                continue
            self._index += 1
            if isinstance(outcome, Unusable):
                self._leave_out(str(outcome))
                continue
            self._usable += 1
            yield outcome

    def _leave_out(self, reason: str) -> None:
        self._unusable[reason] += 1
        if self._epoch == 0:
            self.skipped[reason] += 1

    def _end_epoch(self) -> None:
        if self._whole and not self._usable:
            raise DataError(
                f"{self.collection.name}: nothing in it can be used "
                f"({by_reason(self._unusable) or 'it is empty'})"
            )
        self._begin_epoch(self._epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which determines everything that `draw` will return."""
        return {"epoch": self._epoch, "index": self._index, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        # A checkpoint is the first process's; were its counts taken over by all, their sum would be
        # too large.
        self.skipped = Counter(state["skipped"] if rank() == 0 else {})
        self._restart(state["epoch"], state["index"])

    def _places(self, epoch: int, first: int) -> Iterator[_Place | None]:
        """Yield everything from a position on, without end; None after the last of every epoch."""
        while True:
            for index, record in islice(enumerate(self.collection.epoch(epoch)), first, None):
                yield epoch, index, record
            yield None
            epoch, first = epoch + 1, 0

    def _load(self, place: _Place | None) -> _CaptionedImage | Unusable | None:
        """Return an image, uint8 [3, H, W], with its caption, or the reason why there is none."""
        if place is None:
            return None
        epoch, index, record = place
        if isinstance(record, Unusable):
            return record
        x, y = np.random.default_rng([self.seed, epoch, index]).random(2)
        try:
            return load(record, self.size, self.filters, (x, y))
        except Unusable as reason:
            return reason


def load(
    record: Record, size: tuple[int, int], filters: Filters, place: tuple[float, float]
) -> _CaptionedImage:
    """Return (pixels uint8 [3, H, W], caption).

    Raises Unusable; a missing caption is found before the image is decoded.
    """
    if record.caption is None:
        raise Unusable("no caption")
    caption = (
        record.caption if isinstance(record.caption, str) else _text(_contents(record.caption))
    )
    if "\0" in caption:  # UTF-16, of which ASCII's letters pass for UTF-8
        raise Unusable("caption is not UTF-8")
    if not any(letter.isprintable() and not letter.isspace() for letter in caption):
        raise Unusable("empty caption")
    pixels = decode(_contents(record.image), size, filters, place)
    return torch.from_numpy(pixels).permute(2, 0, 1), caption.strip()


def _contents(file: Path | bytes) -> bytes:
    try:
        return file.read_bytes() if isinstance(file, Path) else file
    except OSError:
        raise Unusable("unreadable file") from None


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable("caption is not UTF-8") from None


def in_order(function: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """Yield function(item) for every item in order, computed a few items ahead on threads.

    Pillow releases the interpreter's lock while it decodes. threads: 0 computes on demand.
    """
    if not threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
