"""The worker process: receive → schedule → start → step → finish, until told to stop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from model.runtime import prepare
from server import logs
from server.engine.protocol import Beat, Cancel, Dropped, Failed, Finished, Image, Job, Ready, Running, Step, Stop, Timings
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId, Scheduler
from server.settings import Settings

log = logging.getLogger(__name__)

DEVICE_FAILED = 70

_BEAT_S = 0.25
_IDLE_BEAT_S = 1.0

Result = TypeVar("Result")


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
        self._steps: list[Step] = []
        self._announced: tuple[str, ...] = ()
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
                    self.connection.send(Dropped(id))
                case Stop():
                    return False
            if self.scheduler.idle:
                break
        return True

    def _start(self, rows: list[RowId]) -> None:
        for part in _by_job(rows):
            progress = self._progress[part[0].job]
            progress.started_at = progress.started_at or time.perf_counter()
            self._attempt(part, self._encode)
            progress.stepping_since = progress.stepping_since or time.perf_counter()

    def _encode(self, rows: list[RowId]) -> list[RowId]:
        progress = self._progress[rows[0].job]
        progress.truncated = self.runner.start(self.scheduler.job(rows[0].job), [row.index for row in rows], progress.watch)
        return rows

    def _step(self, rows: list[RowId]) -> None:
        if rows and (done := self._attempt(rows, self._advance)):
            self._finish(done)

    def _advance(self, rows: list[RowId]) -> list[RowId]:
        job = self.scheduler.job(rows[0].job)
        began = time.perf_counter()
        done = self.runner.step(job.model, rows)
        self._steps.append(Step(len(rows), job.width * job.height, time.perf_counter() - began))
        return done

    def _finish(self, rows: list[RowId]) -> None:
        watch = Stopwatch()
        with watch("decode"):
            images = self._attempt(rows, self._decode)
        for row, image in images:
            self.scheduler.finish(row)
            self._progress[row.job].images.append(image)
        for id in dict.fromkeys(row.job for row, _ in images):
            self._progress[id].watch.add(watch)
            self._answer_if_complete(id, denoised_at=watch.began)

    def _decode(self, rows: list[RowId]) -> list[tuple[RowId, Image]]:
        model = self.scheduler.job(rows[0].job).model
        return list(zip(rows, self.runner.decode(model, rows), strict=True))

    # ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _attempt(self, rows: list[RowId], stage: Callable[[list[RowId]], list[Result]]) -> list[Result]:
        """Runs a stage for rows together or, should that raise, for one job after the other: only those that raise alone fail.

        A stage changes no row before all of its rows are computed, so running it again is harmless. Raises torch.AcceleratorError: after
        that nothing can be computed in this process.
        """
        parts = _by_job(rows)
        self._announce(tuple(part[0].job for part in parts))
        try:
            return stage(rows)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.error("a stage raised", exc_info=error, extra={"fields": {"jobs": len(parts)}})
            out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # Only here, where the error and the tensors in its frames are gone.
        if out_of_memory:
            torch.cuda.empty_cache()
        if len(parts) > 1:
            return [result for part in parts for result in self._attempt(part, stage)]
        if out_of_memory:
            self._fail(rows[0].job, "out_of_memory", "the device ran out of memory", repeating=True)
        else:
            self._fail(rows[0].job, "internal", "the request could not be computed", repeating=False)
        return []

    def _announce(self, jobs: tuple[str, ...]) -> None:
        if jobs != self._announced:
            self.connection.send(Running(jobs))
            self._announced = jobs

    def _fail(self, id: str, code: str, message: str, *, repeating: bool) -> None:
        self.connection.send(Failed(id, code, message, repeating))  # type: ignore[arg-type]
        self._forget(id)

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

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

    def _forget(self, id: str) -> None:
        self.runner.drop(self.scheduler.remove(id))
        self._progress.pop(id, None)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_S or self.scheduler.idle:
            self.connection.send(Beat(tuple(self._steps), self.scheduler.rows_running, self.scheduler.rows_waiting))
            self._steps.clear()
            self._beat_at = now


def _by_job(rows: list[RowId]) -> list[list[RowId]]:
    """Rows → the rows of each job, in order."""
    parts: dict[str, list[RowId]] = {}
    for row in rows:
        parts.setdefault(row.job, []).append(row)
    return list(parts.values())


def main(connection: Connection, settings: Settings, make_runner: Callable[[Settings], Runner] = Runner) -> None:
    """A worker process from its first line to its last. make_runner: what loads the weights."""
    logs.configure(settings.log_level)
    prepare(settings.threads)
    try:
        runner = make_runner(settings)
        runner.warm_up()
        connection.send(Ready(str(runner.device), str(runner.dtype).removeprefix("torch.")))
        Worker(connection, runner, settings.max_batch_rows).run()
    except (EOFError, BrokenPipeError):
        log.warning("the API process is gone")
    except torch.AcceleratorError:
        log.critical("the device failed", exc_info=True)
        # An orderly exit would free tensors on a device that answers to nothing any more, and may hang in it.
        os._exit(DEVICE_FAILED)
