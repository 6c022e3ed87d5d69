"""One unfinished job on the API process's side: who has it, and what its caller is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from server.engine.costs import Forecast
from server.engine.errors import EngineError
from server.engine.protocol import Drawn, Finished, Job, Preview
from server.engine.supervisor import Supervisor

OnPreview = Callable[[Preview], object]
OnDrawn = Callable[[Drawn], object]
OnStarted = Callable[[], object]


@dataclass(slots=True)
class Pending:
    """worker, sent_at: who was given it when, None while it waits. patience: ends a wait for a worker."""

    job: Job
    arrived_at: float
    forecast: Forecast
    answer: asyncio.Future[Finished | EngineError]
    on_started: OnStarted | None = None
    on_preview: OnPreview | None = None
    on_drawn: OnDrawn | None = None
    worker: Supervisor | None = None
    sent_at: float | None = None
    patience: asyncio.TimerHandle | None = None
    lone_deaths: int = 0
    # The number of each image's latest preview: a worker that begins again begins with the first.
    _previewed: dict[int, int] = field(default_factory=dict)
    _handed_out: set[int] = field(default_factory=set)

    @property
    def rows(self) -> int:
        return len(self.job.seeds)

    def resolve(self, answer: Finished | EngineError) -> None:
        # Whoever awaited it may be cancelled in the same turn of the loop.
        if not self.answer.done():
            self.answer.set_result(answer)

    def finish(self, message: Finished, sent_at: float) -> Finished:
        """Resolves to the answer, its queue time counted from the arrival here; returns it."""
        timings = replace(message.timings, queue=message.timings.queue + sent_at - self.arrived_at)
        answer = replace(message, timings=timings)
        self.resolve(answer)
        return answer

    def start(self) -> None:
        """Says once that the first of its rows is begun."""
        if self.on_started and not self.answer.done():
            self.on_started()
        self.on_started = None

    def show(self, preview: Preview) -> None:
        """Hands on a preview unless this one, or a later one of the image, was handed on before."""
        if self.on_preview and not self.answer.done() and preview.number > self._previewed.get(preview.image.index, -1):
            self._previewed[preview.image.index] = preview.number
            self.on_preview(preview)

    def hand_out(self, drawn: Drawn) -> None:
        """Hands on an image unless it was handed on before: a worker that begins again sends all of them."""
        if self.on_drawn and not self.answer.done() and drawn.image.index not in self._handed_out:
            self._handed_out.add(drawn.image.index)
            self.on_drawn(drawn)

    def be_sent(self, worker: Supervisor) -> None:
        self.be_patient(None)
        self.worker, self.sent_at = worker, time.monotonic()
        worker.send(self.job)

    def be_patient(self, patience: asyncio.TimerHandle | None) -> None:
        if self.patience:
            self.patience.cancel()
        self.patience = patience
