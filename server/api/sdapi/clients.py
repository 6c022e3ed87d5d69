"""State of AUTOMATIC1111's clients: running requests, their progress, and the chosen model.

A client is an API key or, without keys, an address. It sees, interrupts and changes only its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fastapi import Request, Response

from server.api.planning.plan import Plan
from server.engine.latency_model import Forecast
from server.engine.messages import Finished, Preview

Result = TypeVar("Result")

# Clients whose chosen model is remembered; beyond them, the one that has not chosen for longest is
# forgotten.
MAX_CHOICES = 1024
# Progress of a running request: clients take 0 and 1 for an idle server.
LEAST_PROGRESS, MOST_PROGRESS = 0.01, 0.99


def _unset_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class Drawing:
    """A running request.

    Attributes:
        job: the endpoint's name.
        began: monotonic seconds.
        timestamp: the local time at which it began, as digits.
        plan: None until its images are decoded.
        answer_early: returns the answer with previews as its images; None until there is a plan.
        predicted_s: predicted seconds from the admission to the answer.
        admitted_at: monotonic seconds, None until the engine has the job.
        previews: the latest of each image, by index.
        is_drawn: whether its images wait only for their files; an interruption comes too late.
        interrupted: done when the client interrupts it.
        shown: the preview that was shown last, and its file in base64.
    """

    job: str
    began: float = field(default_factory=time.monotonic)
    timestamp: str = field(default_factory=lambda: time.strftime("%Y%m%d%H%M%S"))
    plan: Plan | None = None
    answer_early: Callable[[Finished], Awaitable[Response]] | None = None
    predicted_s: float = 0.0
    admitted_at: float | None = None
    previews: dict[int, Preview] = field(default_factory=dict)
    is_drawn: bool = False
    interrupted: asyncio.Future[None] = field(default_factory=_unset_future)
    shown: tuple[Preview, asyncio.Future[str]] | None = None

    def admit(self, forecast: Forecast) -> None:
        """Note the prediction of an admitted job."""
        self.predicted_s, self.admitted_at = forecast.seconds, time.monotonic()

    def preview(self, preview: Preview) -> None:
        """Note an image's latest preview."""
        self.previews[preview.image.index] = preview

    def finish_drawing(self) -> None:
        """Drop the previews, which cost as much memory as the images that the engine returned."""
        if not self.interrupted.done():
            self.is_drawn = True
            self.previews.clear()
            self.shown = None

    def interrupt(self) -> None:
        """End the request, unless it is drawn."""
        if not self.is_drawn and not self.interrupted.done():
            self.interrupted.set_result(None)

    @property
    def steps(self) -> int:
        """Steps of each image, 0 until there is a plan."""
        return 0 if self.plan is None else self.plan.job.steps

    @property
    def progress(self) -> float:
        """The finished part, by the previews and by the time that was predicted."""
        return min(MOST_PROGRESS, max(LEAST_PROGRESS, self._by_previews, self._by_time))

    @property
    def eta_s(self) -> float:
        """Seconds until the answer, if it goes on like this."""
        elapsed = time.monotonic() - self.began
        return elapsed / self.progress - elapsed

    @property
    def _by_previews(self) -> float:
        if self.is_drawn:
            return 1.0
        if self.plan is None:
            return 0.0
        job = self.plan.job
        parts = [preview.number + 1 for preview in self.previews.values()]
        return sum(parts) / (len(job.seeds) * (len(job.preview_steps) + 1))

    @property
    def _by_time(self) -> float:
        if self.admitted_at is None or self.predicted_s <= 0:
            return 0.0
        return (time.monotonic() - self.admitted_at) / self.predicted_s

    async def unless_interrupted(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """Return the result of `work`; cancel it and return None when the client interrupts it."""
        task = asyncio.create_task(work)
        events: tuple[asyncio.Future[Any], ...] = (task, self.interrupted)
        try:
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Clients:
    """Running requests and chosen models by client."""

    def __init__(self) -> None:
        self._drawings: dict[str, list[Drawing]] = {}
        self._choices: OrderedDict[str, str] = OrderedDict()

    def drawings(self, client: str) -> list[Drawing]:
        """Return the client's running requests, the oldest first."""
        return list(self._drawings.get(client, ()))

    @contextmanager
    def drawing(self, client: str, job: str) -> Iterator[Drawing]:
        """Count a request of the client as running within the context. job: its name."""
        drawing = Drawing(job)
        self._drawings.setdefault(client, []).append(drawing)
        try:
            yield drawing
        finally:
            self._drawings[client].remove(drawing)
            if not self._drawings[client]:
                del self._drawings[client]

    def interrupt(self, client: str) -> None:
        """End the client's running requests."""
        for drawing in self.drawings(client):
            drawing.interrupt()

    def choose(self, client: str, model: str) -> None:
        """Remember the model of the client's next requests."""
        self._choices[client] = model
        self._choices.move_to_end(client)
        if len(self._choices) > MAX_CHOICES:
            self._choices.popitem(last=False)

    def chosen(self, client: str) -> str | None:
        """Return the model that the client chose, None if it chose none."""
        return self._choices.get(client)


def clients_of(request: Request) -> Clients:
    """Return the state of the clients of the request's app."""
    return cast(Clients, request.app.state.sdapi)
