"""What the endpoints need of an engine, wherever its workers are."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from server.engine.messages import Finished
from server.engine.supervisor import WorkerStatus
from server.metrics import Metrics
from server.settings import Settings


class Engine(Protocol):
    """`EngineClient` is one in this process; its docstrings say what is promised."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self) -> WorkerStatus: ...

    @property
    def run(self) -> Callable[..., Coroutine[Any, Any, Finished]]:
        """Of a job, and of functions to be called while it runs, by the names of `EngineClient.run`'s parameters."""


MakeEngine = Callable[[Settings, Metrics], Engine]
