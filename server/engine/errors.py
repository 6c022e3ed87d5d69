"""How a job can end without a picture."""

# ruff: noqa: N818  (they name states of the job, as asyncio.QueueFull does)

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """The job was not done."""

    def __reduce__(self) -> tuple[Any, ...]:
        # As it is, not made anew from its message: the classes below are made of other things.
        return type(self).__new__, (type(self), *self.args), self.__dict__


class QueueFull(EngineError):
    """Too many rows are unfinished. retry_after: seconds in which the work now queued should be done."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class DeadlineUnreachable(EngineError):
    """The answer would come too late. retry_after: seconds in which enough of the work now queued should be done.

    repeating: whether it could be in time on an idle server.
    """

    def __init__(self, needed: float, allowed: float, repeating: bool) -> None:
        super().__init__(f"the answer would take about {needed:.2f} s, more than the {allowed:.2f} s that timeout_s leaves")
        self.retry_after = needed - allowed
        self.repeating = repeating


class Starting(EngineError):
    """No worker became ready within `start_wait_s`."""


class Draining(EngineError):
    """The server is stopping."""


class WorkerLost(EngineError):
    """The worker died, or stalled and was killed, with the job in it, and none was ready to repeat it within `start_wait_s`."""


class DeadlineExceeded(EngineError):
    """The job's deadline passed first."""


class JobFailed(EngineError):
    """The worker could not do the job. repeating: whether trying again could help."""

    def __init__(self, code: str, message: str, repeating: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.repeating = repeating
