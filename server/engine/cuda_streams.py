"""Run starts and decodes on CUDA in a stream beside the steps. On a CPU everything runs in line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Mark:
    """A place in the side stream. Without a stream it is passed at once."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    @property
    def passed(self) -> bool:
        """Return whether the device has computed everything before it."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until the device has computed everything before it."""
        if self._event is not None:
            self._event.synchronize()


class Streams:
    """The device's own stream, in which rows are stepped, and on CUDA another one beside it.

    On a CPU everything runs in line. The CUDA half follows the documented rules for streams and the
    caching allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_step: torch.cuda.Event | None = None

    @contextmanager
    def beside(self, reading: Iterable[Tensor] = ()) -> Iterator[None]:
        """Launch everything in this context beside the steps.

        reading: tensors made by steps; it then runs after the steps that are already launched.
        """
        if self._side is None:
            yield
            return
        read = list(reading)
        if read:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in read:
            tensor.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

    def mark(self) -> Mark:
        """Return the place after everything launched beside the steps so far."""
        return Mark(None if self._side is None else self._side.record_event())

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Let steps read tensors made beside them.

        Their memory is not reused before the steps end.
        """
        if self._side is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy that is complete when a mark set after this call is passed."""
        if self._side is None:
            return tensor.cpu()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    def stepped(self) -> None:
        """Wait for the step before the one that was launched last.

        With more than two in flight a new row would wait for all of them.
        """
        if self._side is not None:
            if self._last_step is not None:
                self._last_step.synchronize()
            self._last_step = torch.cuda.current_stream(self._device).record_event()
