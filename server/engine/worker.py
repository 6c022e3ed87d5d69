"""The worker process: receive → schedule → start → step → finish, until told to stop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from model.runtime import prepare
from server import logs
from server.engine.protocol import Beat, Cancel, Failed, Finished, Image, Job, Ready, Stop, Timings
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId, Scheduler
from server.settings import Settings

log = logging.getLogger(__name__)

_BEAT_S = 0.25
_IDLE_BEAT_S = 1.0


@dataclass
class _Progress:
    """What a job has so far."""

    arrived_at: float
    started_at: float | None = None
    stepping_since: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)
    images: list[Image] = field(default_factory=list)
    truncated: tuple[str, ...] = ()


class Worker:
    """One runner, one scheduler, and the pipe to the API process."""

    def __init__(self, connection: Connection, runner: Runner, max_rows: int) -> None:
        self.connection, self.runner = connection, runner
        self.scheduler = Scheduler(max_rows)
        self._progress: dict[str, _Progress] = {}
        self._steps: list[tuple[int, float]] = []
        self._beat_at = 0.0

    def run(self) -> None:
        """Serves until Stop, or until the API process is gone (EOFError)."""
        while self._receive():
            for id in self.scheduler.expired(time.monotonic()):
                self._fail(id, "deadline", "the deadline passed", repeating=True)
            self._start(self.scheduler.admit())
            self._step(self.scheduler.next_rows())
            self._beat()

    def _receive(self) -> bool:
        """Takes every message that is there, waiting for one only while there is nothing to do. False: stop."""
        while self.connection.poll(_IDLE_BEAT_S if self.scheduler.idle else 0):
            match self.connection.recv():
                case Job() as job:
                    self.scheduler.add(job)
                    self._progress[job.id] = _Progress(arrived_at=time.perf_counter())
                case Cancel(id):
                    self._forget(id)
                case Stop():
                    return False
            if self.scheduler.idle:
                break
        return True

    def _start(self, rows: list[RowId]) -> None:
        indices: dict[str, list[int]] = {}
        for row in rows:
            indices.setdefault(row.job, []).append(row.index)
        for id, wanted in indices.items():
            progress = self._progress[id]
            progress.started_at = progress.started_at or time.perf_counter()
            try:
                progress.truncated = self.runner.start(self.scheduler.job(id), wanted, progress.watch)
            except Exception as error:
                self._fail_all([RowId(id, wanted[0])], error)
            progress.stepping_since = progress.stepping_since or time.perf_counter()

    def _step(self, rows: list[RowId]) -> None:
        if not rows:
            return
        model = self.scheduler.job(rows[0].job).model
        began = time.perf_counter()
        try:
            done = self.runner.step(model, rows)
        except Exception as error:
            self._fail_all(rows, error)
            return
        self._steps.append((len(rows), time.perf_counter() - began))
        if done:
            self._finish(model, done)

    def _finish(self, model: str, rows: list[RowId]) -> None:
        watch = Stopwatch()
        try:
            with watch("decode"):
                images = self.runner.decode(model, rows)
        except Exception as error:
            self._fail_all(rows, error)
            return
        for row, image in zip(rows, images, strict=True):
            self.scheduler.finish(row)
            self._progress[row.job].images.append(image)
        for id in dict.fromkeys(row.job for row in rows):
            self._progress[id].watch.add(watch)
            self._answer_if_complete(id, denoised_at=watch.began)

    def _answer_if_complete(self, id: str, denoised_at: float) -> None:
        progress = self._progress[id]
        if len(progress.images) == len(self.scheduler.job(id).seeds):
            self.connection.send(self._finished(id, progress, denoised_at))
            self._forget(id)

    def _finished(self, id: str, progress: _Progress, denoised_at: float) -> Finished:
        timings = Timings(
            queue=(progress.started_at or progress.arrived_at) - progress.arrived_at,
            denoise=denoised_at - progress.stepping_since,
            **progress.watch.seconds,
        )
        return Finished(id, tuple(progress.images), timings, progress.truncated)

    def _fail_all(self, rows: list[RowId], error: Exception) -> None:
        """Answers for the jobs whose rows were in the stage that raised; the worker goes on."""
        log.error("a stage raised", exc_info=error)
        for id in dict.fromkeys(row.job for row in rows):
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                self._fail(id, "out_of_memory", "the device ran out of memory", repeating=True)
            else:
                self._fail(id, "internal", "the request could not be computed", repeating=False)

    def _fail(self, id: str, code: str, message: str, *, repeating: bool) -> None:
        self.connection.send(Failed(id, code, message, repeating))  # type: ignore[arg-type]
        self._forget(id)

    def _forget(self, id: str) -> None:
        self.runner.drop(self.scheduler.remove(id))
        self._progress.pop(id, None)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_S or self.scheduler.idle:
            self.connection.send(Beat(tuple(self._steps), self.scheduler.rows_running, self.scheduler.rows_waiting))
            self._steps.clear()
            self._beat_at = now


def main(connection: Connection, settings: Settings) -> None:
    """A worker process from its first line to its last."""
    logs.configure(settings.log_level)
    prepare(settings.threads)
    try:
        runner = Runner(settings)
        runner.warm_up()
        connection.send(Ready(str(runner.device), str(runner.dtype).removeprefix("torch.")))
        Worker(connection, runner, settings.max_batch_rows).run()
    except (EOFError, BrokenPipeError):
        log.warning("the API process is gone")
