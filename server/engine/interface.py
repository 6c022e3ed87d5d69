"""Define what the endpoints need of an engine, wherever its workers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from server.engine.hooks import NO_HOOKS, Hooks
from server.engine.job import Job
from server.engine.messages import Finished
from server.engine.supervisor import WorkerStatus
from server.metrics import Metrics
from server.settings import Settings


class Engine(Protocol):
    """The methods of `EngineClient`, the engine in this process, whose docstrings specify them."""

    async def start(self) -> None:
        """Start the workers; return before they are ready."""

    async def stop(self) -> None:
        """Drain, then stop the workers."""

    def status(self) -> WorkerStatus:
        """Return whether a job sent now would be started, and if not, why."""

    def check_room(self, rows: int) -> None:
        """Raise QueueFull or Draining if a job of so many images would be rejected now."""

    async def run(self, job: Job, hooks: Hooks = NO_HOOKS) -> Finished:
        """Run a job."""


MakeEngine = Callable[[Settings, Metrics], Engine]
