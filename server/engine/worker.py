"""Run the worker process: receive → schedule → start → step → decode, until told to stop."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model.row_builder import group_by
from model.runtime import prepare
from server import logs
from server.engine.decode_queue import Decoder, Due
from server.engine.failure_isolation import Attempts, by_job
from server.engine.messages import (
    Beat,
    Cancel,
    Count,
    Drawn,
    Dropped,
    Failed,
    FailureCode,
    Finished,
    Image,
    Job,
    Preview,
    Ready,
    Running,
    Step,
    Stop,
    Timings,
    Usage,
    receive,
    send,
)
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId, Scheduler
from server.settings import Settings

STATM = Path("/proc/self/statm")


def usage(device: torch.device) -> Usage:
    return Usage(_resident_bytes(), time.process_time(), torch.get_num_threads(), _device_bytes(device) if device.type == "cuda" else {})


def _resident_bytes() -> int:
    """Where the system does not tell, the most it ever was."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_bytes(device: torch.device) -> dict[str, int]:
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


log = logging.getLogger(__name__)

DEVICE_FAILED = 70

_BEAT_S = 0.25
_IDLE_BEAT_S = 1.0


@dataclass
class _Progress:
    """What a job has so far. steps: of all its rows together; a row that begins later in its schedule has those before behind it."""

    arrived_at: float
    started_at: float | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    images: list[Image] = field(default_factory=list)
    truncated: tuple[str, ...] = ()
    steps: int = 0

    def timings(self) -> Timings:
        """All the time since the job's arrival: what is not another stage's is the denoiser's, waits for other rows' turns included."""
        started_at = self.started_at or self.arrived_at
        denoise = time.perf_counter() - started_at - sum(self.watch.seconds.values())
        return Timings(queue=started_at - self.arrived_at, denoise=denoise, **self.watch.seconds)


class Worker:
    """One runner, one scheduler, and the pipe to the API process."""

    def __init__(self, connection: Connection, runner: Runner, max_rows: int) -> None:
        self.connection, self.runner = connection, runner
        self._attempt = Attempts(self._announce, self._fail)
        self.scheduler, self.decoder = Scheduler(max_rows), Decoder(runner, self._attempt)
        self._progress: dict[str, _Progress] = {}
        self._steps: list[Step] = []
        self._counted: Counter[Count] = Counter()
        self._announced: tuple[str, ...] = ()
        self._beat_at = 0.0

    def run(self) -> None:
        """Serves until Stop, or until the API process is gone (EOFError)."""
        while self._receive():
            for id in self.scheduler.expired(time.monotonic()):
                self._fail(id, "deadline", "the deadline passed", repeating=True)
            self._start(self.scheduler.admit(self.decoder.rows_finished))
            self._step(self.scheduler.next_rows())
            self._decode()
            self._beat()

    def _receive(self) -> bool:
        """Takes every message that is there, waiting for one only while there is nothing to do. False: stop."""
        while self.connection.poll(_IDLE_BEAT_S if self.scheduler.idle else 0):
            match receive(self.connection):
                case Job() as job:
                    self.scheduler.add(job)
                    self._progress[job.id] = _Progress(arrived_at=time.perf_counter())
                case Cancel(id):
                    self._forget(id)
                    send(self.connection, Dropped(id))
                case Stop():
                    return False
            if self.scheduler.idle:
                break
        return True

    # ── stages ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, rows: list[RowId]) -> None:
        """All in one batch, but for jobs that may have killed a worker."""
        for batch in group_by(rows, lambda row: row.job if self.scheduler.job(row.job).alone else None):
            for row in self._attempt(batch, self._encode):
                # An edit that takes no step is done as it begins.
                if self.runner.steps_done(row) == self.scheduler.job(row.job).sampling.steps:
                    self._finish(row)

    def _encode(self, rows: list[RowId]) -> list[RowId]:
        parts = [(self.scheduler.job(part[0].job), [row.index for row in part]) for part in by_job(rows)]
        watch, now = Stopwatch(), time.perf_counter()
        for (job, _), truncated in zip(parts, self.runner.start(parts, watch), strict=True):
            progress = self._progress[job.id]
            progress.started_at, progress.truncated = progress.started_at or now, truncated
            progress.watch.add(watch)
        self._count_steps(rows)
        return rows

    def _count_steps(self, rows: list[RowId]) -> None:
        """Of rows that begin."""
        for row in rows:
            self._progress[row.job].steps += self.runner.steps_done(row)

    def _step(self, rows: list[RowId]) -> None:
        for row in self._attempt(self.runner.started(rows), self._advance) if rows else []:
            job, steps = self.scheduler.job(row.job), self.runner.steps_done(row)
            if steps == job.sampling.steps:
                self._finish(row)
            elif steps in job.preview_steps:
                self.decoder.add(row, Due(self.scheduler.pool(row), job.preview_steps.index(steps)))

    def _finish(self, row: RowId) -> None:
        self.scheduler.finish(row)
        self.decoder.add(row, Due(self.scheduler.pool(row)))

    def _advance(self, rows: list[RowId]) -> list[RowId]:
        job, branches, began = self.scheduler.job(rows[0].job), self.runner.branches(rows), time.perf_counter()
        self.runner.step(job.model, rows)
        self._steps.append(Step(len(rows), branches, job.width * job.height, time.perf_counter() - began))
        for row in rows:
            self._progress[row.job].steps += 1
        return rows

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decode(self) -> None:
        decoded = [each for each in self.decoder.turn(idle=not self.scheduler.rows_running) if each.row.job in self._progress]
        for each in decoded:
            if each.preview is None:
                progress = self._progress[each.row.job]
                progress.images.append(each.image)
                if self.scheduler.job(each.row.job).early:
                    send(self.connection, Drawn(each.row.job, each.image, progress.truncated))
            else:
                send(self.connection, Preview(each.row.job, each.preview, each.step, each.image))
        batches = dict.fromkeys((each.row.job, each.seconds) for each in decoded if each.preview is None)
        for id, seconds in batches:
            self._progress[id].watch.count("decode", seconds)
        for id in dict.fromkeys(id for id, _ in batches):
            self._answer_if_complete(id)

    def _answer_if_complete(self, id: str) -> None:
        progress = self._progress[id]
        if len(progress.images) == len(self.scheduler.job(id).seeds):
            send(self.connection, Finished(id, tuple(progress.images), progress.timings(), progress.truncated))
            self._forget(id)

    def _announce(self, jobs: tuple[str, ...]) -> None:
        """What is decoded beside a stage may be what breaks the device in it."""
        jobs = tuple(dict.fromkeys((*jobs, *(row.job for row in self.decoder.rows_underway))))
        if jobs != self._announced:
            send(self.connection, Running(jobs))
            self._announced = jobs

    def _fail(self, id: str, code: FailureCode, message: str, *, repeating: bool) -> None:
        send(self.connection, Failed(id, code, message, repeating))
        self._forget(id)

    def _forget(self, id: str) -> None:
        self.runner.drop([*self.scheduler.remove(id), *self.decoder.remove(id)])
        self._progress.pop(id, None)

    def _steps_left(self, id: str) -> int:
        job = self.scheduler.job(id)
        return len(job.seeds) * job.sampling.steps - self._progress[id].steps

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_S or self.scheduler.idle:
            counted = Counter(self.runner.counters)
            beat = Beat(
                tuple(self._steps),
                self.scheduler.rows_running,
                self.scheduler.rows_waiting,
                counted - self._counted,
                self.runner.cache.held,
                {id: self._steps_left(id) for id, progress in self._progress.items() if progress.started_at is not None},
                usage(self.runner.device),
            )
            send(self.connection, beat)
            self._steps.clear()
            self._counted, self._beat_at = counted, now


def main(connection: Connection, settings: Settings, make_runner: Callable[[Settings], Runner] = Runner) -> None:
    """A worker process from its first line to its last. make_runner: what loads the weights."""
    logs.configure(settings.log_level)
    prepare(settings.threads)
    try:
        runner = make_runner(settings)
        runner.warm_up()
        runner.choose_threads()
        send(connection, Ready(str(runner.device), str(runner.dtype).removeprefix("torch.")))
        Worker(connection, runner, settings.max_batch_rows).run()
    except (EOFError, BrokenPipeError):
        log.warning("the API process is gone")
    except torch.AcceleratorError:
        log.critical("the device failed", exc_info=True)
        # An orderly exit would free tensors on a device that answers to nothing any more, and may hang in it.
        os._exit(DEVICE_FAILED)
