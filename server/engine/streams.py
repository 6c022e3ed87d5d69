"""Encoding and decoding beside the steps: on CUDA in a stream of their own, elsewhere in line, where nothing could be gained.

Elsewhere every mark is passed as soon as it is set. The CUDA half follows the documented rules for streams and the caching allocator, but
has not been run on a device yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Mark:
    """A place in the side stream."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    @property
    def passed(self) -> bool:
        """Whether the device has come by."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Streams:
    """The device's own stream, in which rows are stepped, and the one beside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_step: torch.cuda.Event | None = None

    @contextmanager
    def beside(self, reading: Iterable[Tensor] = ()) -> Iterator[None]:
        """What is launched in here runs beside the steps; if it reads what they made, after those already launched."""
        if self._side is None:
            yield
            return
        made = list(reading)
        if made:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in made:
            tensor.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

    def mark(self) -> Mark:
        """After all that was launched beside the steps so far."""
        return Mark(None if self._side is None else self._side.record_event())

    def hand_over(self, made: Iterable[Tensor]) -> None:
        """Tensors made beside the steps, and past their mark, will be read by steps: their memory is not free before those are through."""
        if self._side is not None:
            for tensor in made:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy that is complete when a mark set after this call is passed."""
        if self._side is None:
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def stepped(self) -> None:
        """Called after a step was launched: waits for the one before it. With more than two under way a new row would wait for all."""
        if self._side is not None:
            if self._last_step is not None:
                self._last_step.synchronize()
            self._last_step = torch.cuda.current_stream(self._device).record_event()
