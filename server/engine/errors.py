"""Define the ways in which a job can end without an image."""

# ruff: noqa: N818  (they name states of the job, as asyncio.QueueFull does)

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """The job was not done."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied as it is, not built again from its message: the classes below take other arguments.
        return type(self).__new__, (type(self), *self.args), self.__dict__


class QueueFull(EngineError):
    """Too much is unfinished. retry_after: seconds until this client should retry."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class DeadlineUnreachable(EngineError):
    """The answer would come after the deadline.

    retry_after: seconds until this client should retry; default: until enough of the present queue
    should be done. retryable: whether the job could be in time on an idle server.
    """

    def __init__(
        self, needed: float, allowed: float, retryable: bool, retry_after: float | None = None
    ) -> None:
        left = f"the {allowed:.2f} s that timeout_s leaves"
        super().__init__(f"the answer would take about {needed:.2f} s, more than {left}")
        self.retry_after = needed - allowed if retry_after is None else retry_after
        self.retryable = retryable


class Starting(EngineError):
    """No worker became ready within `start_wait_s`, or before the deadline."""


class Draining(EngineError):
    """The server is stopping."""


class WorkerLost(EngineError):
    """The job's worker was lost, and no other became ready in time to replay it."""


class DeadlineExceeded(EngineError):
    """The job's deadline passed first."""


class JobFailed(EngineError):
    """The worker could not do the job. retryable: whether another attempt could succeed."""

    def __init__(self, code: str, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
