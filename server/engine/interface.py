"""Define what the endpoints need of an engine, wherever its workers are."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

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

    @property
    def run(self) -> Callable[..., Coroutine[Any, Any, Finished]]:
        """Run a job; hooks are passed by the names of `EngineClient.run`'s parameters."""


MakeEngine = Callable[[Settings, Metrics], Engine]
