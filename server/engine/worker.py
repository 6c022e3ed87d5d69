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
from typing import TypeVar

import torch

from model.row_builder import group_by
from model.runtime import prepare
from server import logs
from server.engine.decode_queue import DecodedImage, DecodeQueue, DecodeRequest
from server.engine.failure_isolation import IsolatedStage, by_job
from server.engine.messages import (
    Cancel,
    Count,
    Drawn,
    Dropped,
    Failed,
    FailureCode,
    Finished,
    Heartbeat,
    Image,
    Job,
    Preview,
    ProcessStats,
    Ready,
    Running,
    Step,
    Stop,
    Timings,
    receive_message,
    send_message,
)
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId, Scheduler
from server.settings import Settings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# The exit code of a worker whose device failed.
DEVICE_FAILED = 70

_HEARTBEAT_S = 0.25
_IDLE_HEARTBEAT_S = 1.0
_STATM = Path("/proc/self/statm")


@dataclass
class _Progress:
    """The state of one job. steps: of all its rows together, those skipped at the start included."""

    arrived_at: float
    started_at: float | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    images: list[Image] = field(default_factory=list)
    truncated: tuple[str, ...] = ()
    steps: int = 0

    def timings(self) -> Timings:
        """Split the time since the job's arrival into stages.

        Time that belongs to no other stage is the denoiser's, waits for other rows included.
        """
        started_at = self.started_at or self.arrived_at
        denoise = time.perf_counter() - started_at - sum(self.watch.seconds.values())
        return Timings(queue=started_at - self.arrived_at, denoise=denoise, **self.watch.seconds)


class Worker:
    """One runner, one scheduler, and the pipe to the API process."""

    def __init__(self, connection: Connection, runner: Runner, max_rows: int) -> None:
        self.connection, self.runner = connection, runner
        self.scheduler, self.decode_queue = Scheduler(max_rows), DecodeQueue()
        self._progress: dict[str, _Progress] = {}
        self._steps: list[Step] = []
        self._counts_sent: Counter[Count] = Counter()
        self._announced: tuple[str, ...] = ()
        self._heartbeat_at = 0.0

    def run(self) -> None:
        """Serve until Stop. Raises EOFError or OSError when the API process is gone."""
        while self._receive():
            for id in self.scheduler.expired(time.monotonic()):
                self._fail(id, "deadline", "the deadline passed", retryable=True)
            self._start(self.scheduler.admit(self.decode_queue.rows_finished))
            self._step(self.scheduler.next_rows())
            self._decode()
            self._send_heartbeat()

    def _receive(self) -> bool:
        """Take every message in the pipe; wait for one only when idle. Return False to stop."""
        while self.connection.poll(_IDLE_HEARTBEAT_S if self.scheduler.idle else 0):
            match receive_message(self.connection):
                case Job() as job:
                    self.scheduler.add(job)
                    self._progress[job.id] = _Progress(arrived_at=time.perf_counter())
                case Cancel(id):
                    self._forget(id)
                    send_message(self.connection, Dropped(id))
                case Stop():
                    return False
            if self.scheduler.idle:
                break
        return True

    # ── stages ────────────────────────────────────────────────────────────────────────────────────

    def _start(self, rows: list[RowId]) -> None:
        """Start all rows in one batch, except for suspects of a crash, which start alone."""
        for batch in group_by(rows, lambda row: row.job if self.scheduler.job(row.job).alone else None):
            for row in self._run_stage(batch, self._build_rows):
                # An edit that takes no step is done as it begins.
                if self.runner.steps_done(row) == self.scheduler.job(row.job).sampling.steps:
                    self._finish(row)

    def _build_rows(self, rows: list[RowId]) -> list[RowId]:
        parts = [(self.scheduler.job(part[0].job), [row.index for row in part]) for part in by_job(rows)]
        watch, now = Stopwatch(), time.perf_counter()
        for (job, _), truncated in zip(parts, self.runner.start(parts, watch), strict=True):
            progress = self._progress[job.id]
            progress.started_at, progress.truncated = progress.started_at or now, truncated
            progress.watch.add(watch)
        for row in rows:
            self._progress[row.job].steps += self.runner.steps_done(row)
        return rows

    def _step(self, rows: list[RowId]) -> None:
        for row in self._run_stage(self.runner.started(rows), self._advance):
            job, steps = self.scheduler.job(row.job), self.runner.steps_done(row)
            if steps == job.sampling.steps:
                self._finish(row)
            elif steps in job.preview_steps:
                self.decode_queue.add(row, DecodeRequest(self.scheduler.pool(row), job.preview_steps.index(steps)))

    def _finish(self, row: RowId) -> None:
        self.scheduler.finish(row)
        self.decode_queue.add(row, DecodeRequest(self.scheduler.pool(row)))

    def _advance(self, rows: list[RowId]) -> list[RowId]:
        job, branches, began = self.scheduler.job(rows[0].job), self.runner.branches(rows), time.perf_counter()
        self.runner.step(job.model, rows)
        self._steps.append(Step(len(rows), branches, job.width * job.height, time.perf_counter() - began))
        for row in rows:
            self._progress[row.job].steps += 1
        return rows

    def _decode(self) -> None:
        """Decode one batch; with no step to take, decode all finished rows. Send the images."""
        idle = not self.scheduler.rows_running
        decoded = self._decode_batch(wait=idle)
        while idle and self.decode_queue.rows_finished:
            decoded += self._decode_batch(wait=idle)
        self._send_images([each for each in decoded if each.row.job in self._progress])

    def _decode_batch(self, *, wait: bool) -> list[DecodedImage]:
        """Begin the next batch, and return the images of the one that is decoded."""
        if requests := self.decode_queue.next_batch():
            model, began = next(iter(requests.values())).pool.model, time.perf_counter()
            decodings = self._run_stage(list(requests), lambda rows: [self.runner.decode(model, rows)])
            self.decode_queue.start(requests, decodings, began)
            started = set(self.decode_queue.rows_in_progress)
            self.runner.drop([row for row in requests if row not in started])  # their jobs failed
        decoded = self.decode_queue.collect(wait=wait)
        self.runner.drop([each.row for each in decoded if each.preview is None])
        return decoded

    def _run_stage(self, rows: list[RowId], stage: Callable[[list[RowId]], list[Result]]) -> list[Result]:
        """Run a stage, each job alone should it raise; fail the jobs that raise alone."""
        attempt = IsolatedStage(rows, stage)
        while batch := attempt.next_batch():
            self._announce(batch)
            if failure := attempt.run(batch):
                self._fail(failure.job, failure.code, failure.message, retryable=failure.retryable)
        return attempt.results

    # ── messages ──────────────────────────────────────────────────────────────────────────────────

    def _send_images(self, decoded: list[DecodedImage]) -> None:
        for each in decoded:
            if each.preview is not None:
                send_message(self.connection, Preview(each.row.job, each.preview, each.step, each.image))
                continue
            progress = self._progress[each.row.job]
            progress.images.append(each.image)
            if self.scheduler.job(each.row.job).early:
                send_message(self.connection, Drawn(each.row.job, each.image, progress.truncated))
        batches = dict.fromkeys((each.row.job, each.seconds) for each in decoded if each.preview is None)
        for id, seconds in batches:
            self._progress[id].watch.count("decode", seconds)
        for id in dict.fromkeys(id for id, _ in batches):
            self._answer_if_complete(id)

    def _answer_if_complete(self, id: str) -> None:
        progress = self._progress[id]
        if len(progress.images) == len(self.scheduler.job(id).seeds):
            answer = Finished(id, tuple(progress.images), progress.timings(), progress.truncated)
            send_message(self.connection, answer)
            self._forget(id)

    def _announce(self, rows: list[RowId]) -> None:
        """Name the jobs that the API process must suspect, should this process die now.

        A decode that runs beside the stage may be the one that breaks the device.
        """
        jobs = tuple(dict.fromkeys(row.job for row in (*rows, *self.decode_queue.rows_in_progress)))
        if jobs != self._announced:
            send_message(self.connection, Running(jobs))
            self._announced = jobs

    def _fail(self, id: str, code: FailureCode, message: str, *, retryable: bool) -> None:
        send_message(self.connection, Failed(id, code, message, retryable))
        self._forget(id)

    def _forget(self, id: str) -> None:
        self.runner.drop([*self.scheduler.remove(id), *self.decode_queue.remove(id)])
        self._progress.pop(id, None)

    def _steps_left(self, id: str) -> int:
        job = self.scheduler.job(id)
        return len(job.seeds) * job.sampling.steps - self._progress[id].steps

    def _send_heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._heartbeat_at < _HEARTBEAT_S and not self.scheduler.idle:
            return
        counts = Counter(self.runner.counters)
        heartbeat = Heartbeat(
            steps=tuple(self._steps),
            rows_running=self.scheduler.rows_running,
            rows_waiting=self.scheduler.rows_waiting,
            counts=counts - self._counts_sent,
            cache_bytes=self.runner.cache.held,
            left={id: self._steps_left(id) for id, each in self._progress.items() if each.started_at is not None},
            stats=process_stats(self.runner.device),
        )
        send_message(self.connection, heartbeat)
        self._steps.clear()
        self._counts_sent, self._heartbeat_at = counts, now


def process_stats(device: torch.device) -> ProcessStats:
    """Return this process's memory, processor time, threads, and memory of its device."""
    device_bytes = _device_bytes(device) if device.type == "cuda" else {}
    return ProcessStats(_resident_bytes(), time.process_time(), torch.get_num_threads(), device_bytes)


def _resident_bytes() -> int:
    """Return the resident memory; where the system has no /proc, the most it ever was."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_bytes(device: torch.device) -> dict[str, int]:
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def main(connection: Connection, settings: Settings, make_runner: Callable[[Settings], Runner] = Runner) -> None:
    """Run a worker process from its first line to its last. make_runner: loads the weights."""
    logs.configure(settings.log_level)
    prepare(settings.threads)
    try:
        runner = make_runner(settings)
        runner.warm_up()
        runner.choose_threads()
        send_message(connection, Ready(str(runner.device), str(runner.dtype).removeprefix("torch.")))
        Worker(connection, runner, settings.max_batch_rows).run()
    except (EOFError, BrokenPipeError):
        log.warning("API process gone")
    except torch.AcceleratorError:
        log.critical("device failed", exc_info=True)
        # An orderly exit would free tensors on a device that answers to nothing any more, and may hang in it.
        os._exit(DEVICE_FAILED)
