"""Run the worker process: receive → schedule → start → step → decode, until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from model.batch_encoder import group_by
from model.image_request import InputImage
from model.runtime import prepare
from model.tiles import Mosaic, lanczos
from server.engine.child import describe
from server.engine.decode_queue import DecodedImage, DecodeQueue, DecodeRequest
from server.engine.failure_isolation import IsolatedStage
from server.engine.job import Job
from server.engine.messages import (
    Cancel,
    Count,
    Crashed,
    Drawn,
    Dropped,
    Failed,
    FailureCode,
    Finished,
    Heartbeat,
    Image,
    Preview,
    ProcessStats,
    Ready,
    Running,
    ShareCPU,
    Step,
    Stop,
    Timings,
    receive_message,
    send_message,
)
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId, Scheduler
from server.memory import resident_bytes
from server.settings import Settings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# The exit code of a worker whose device failed.
DEVICE_FAILED = 70

_HEARTBEAT_S = 0.25
_IDLE_HEARTBEAT_S = 1.0


@dataclass
class _Progress:
    """The state of one job.

    steps: that all its rows together have taken. drawn: images that are to be enlarged, until their
    first tile starts. mosaics: the tiles of images that are being enlarged. step_ends: of a traced
    job's steps, `time.perf_counter` seconds.
    """

    arrived_at: float
    started_at: float | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    images: list[Image] = field(default_factory=list)
    truncated: tuple[str, ...] = ()
    steps: int = 0
    drawn: dict[int, Image] = field(default_factory=dict)
    mosaics: dict[int, Mosaic] = field(default_factory=dict)
    step_ends: list[float] = field(default_factory=list)

    def timings(self) -> Timings:
        """Split the time since the job's arrival into stages.

        Time that belongs to no other stage is the denoiser's, waits for other rows included.
        """
        started_at = self.started_at or self.arrived_at
        denoise = time.perf_counter() - started_at - sum(self.watch.seconds.values())
        return Timings(queue=started_at - self.arrived_at, denoise=denoise, **self.watch.seconds)

    def step_seconds(self) -> tuple[float, ...]:
        """Return `step_ends`, counted from the first encode."""
        started_at = self.started_at or self.arrived_at
        return tuple(end - started_at for end in self.step_ends)


class Worker:
    """One runner, one scheduler, and the pipe to the API process."""

    def __init__(
        self,
        connection: Connection,
        runner: Runner,
        max_rows: int,
        idle_heartbeat_s: float = _IDLE_HEARTBEAT_S,
    ) -> None:
        """Create the worker. idle_heartbeat_s: interval of the heartbeats without jobs."""
        self.connection, self.runner = connection, runner
        self._idle_heartbeat_s = idle_heartbeat_s
        # A GPU computes the rows of a step side by side, a CPU one after the other.
        on_cpu = runner.device.type == "cpu"
        self.scheduler = Scheduler(max_rows, batch_waits=on_cpu)
        self.decode_queue = DecodeQueue()
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
        while self.connection.poll(self._idle_heartbeat_s if self.scheduler.idle else 0):
            match receive_message(self.connection):
                case Job() as job:
                    self.scheduler.add(job)
                    self._progress[job.id] = _Progress(arrived_at=time.perf_counter())
                case Cancel(id):
                    self._forget(id)
                    send_message(self.connection, Dropped(id))
                case ShareCPU(workers):
                    self.runner.threads.share(workers)
                case Stop():
                    return False
            if self.scheduler.idle:
                break
        return True

    # ── stages ────────────────────────────────────────────────────────────────────────────────────

    def _start(self, rows: list[RowId]) -> None:
        """Start all rows in one batch, except for suspects of a crash, which start alone."""
        for batch in group_by(
            rows, lambda row: row.job if self.scheduler.job(row.job).alone else None
        ):
            for row in self._run_stage(batch, self._build_rows):
                # An edit that takes no step is done as it begins.
                if self.runner.done(row):
                    self._finish(row)

    def _build_rows(self, rows: list[RowId]) -> list[RowId]:
        for row in rows:
            self._add_source(row)
        parts = [
            (self.scheduler.job(part[0].job), [row.index for row in part])
            for part in group_by(rows, lambda row: row.job)
        ]
        watch, now = Stopwatch(), time.perf_counter()
        for (job, _), truncated in zip(parts, self.runner.start(parts, watch), strict=True):
            progress = self._progress[job.id]
            progress.started_at, progress.truncated = progress.started_at or now, truncated
            progress.watch.add(watch)
        return rows

    def _add_source(self, row: RowId) -> None:
        """Scale the drawn image that a tile's row is the first to begin with."""
        job = self.scheduler.job(row.job)
        place, enlarge = job.tile(row.index), job.enlarge
        if place is None or enlarge is None:
            return
        waiting = self._progress[job.id].drawn
        if drawn := waiting.get(place[0]):
            canvas = lanczos(drawn.array, enlarge.size, enlarge.tiling.canvas)
            self.scheduler.update(job.with_source(place[0], InputImage.of(canvas)))
            del waiting[place[0]]

    def _step(self, rows: list[RowId]) -> None:
        for row in self._run_stage(self.runner.started(rows), self._advance):
            job = self.scheduler.job(row.job)
            taken = job.steps_taken(row.index, self.runner.steps_done(row))
            if self.runner.done(row):
                self._finish(row)
            elif taken in job.preview_steps:
                self.decode_queue.add(
                    row, DecodeRequest(self.scheduler.pool(row), job.preview_steps.index(taken))
                )

    def _finish(self, row: RowId) -> None:
        self.scheduler.finish(row)
        self.decode_queue.add(row, DecodeRequest(self.scheduler.pool(row)))

    def _advance(self, rows: list[RowId]) -> list[RowId]:
        pool = self.scheduler.pool(rows[0])
        branches = self.runner.branches(rows)
        began = time.perf_counter()
        self.runner.step(pool.model, rows)
        ended = time.perf_counter()
        pixels, seconds = pool.width * pool.height, ended - began
        self._steps.append(Step(len(rows), branches, pixels, seconds, pool.model, pool.denoiser))
        for row in rows:
            self._progress[row.job].steps += 1
        for id in {row.job for row in rows if self.scheduler.job(row.job).traceparent}:
            self._progress[id].step_ends.append(ended)
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
            decodings = self._run_stage(
                list(requests), lambda rows: [self.runner.decode(model, rows)]
            )
            self.decode_queue.start(requests, decodings, began)
            started = set(self.decode_queue.rows_in_progress)
            self.runner.drop([row for row in requests if row not in started])  # their jobs failed
        decoded = self.decode_queue.collect(wait=wait)
        self.runner.drop([each.row for each in decoded if each.preview is None])
        return decoded

    def _run_stage(
        self, rows: list[RowId], stage: Callable[[list[RowId]], list[Result]]
    ) -> list[Result]:
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
            job = self.scheduler.job(each.row.job)
            if place := job.tile(each.row.index):
                self._add_tile(job, *place, each)
            elif each.preview is not None:
                taken = job.steps_taken(each.row.index, each.step)
                send_message(self.connection, Preview(job.id, each.preview, taken, each.image))
            elif job.enlarge:
                self._begin_tiles(job, each.image)
            else:
                self._add_image(job, each.image)
        batches = dict.fromkeys(
            (each.row.job, each.seconds) for each in decoded if each.preview is None
        )
        for id, seconds in batches:
            self._progress[id].watch.count("decode", seconds)
        for id in dict.fromkeys(id for id, _ in batches):
            self._answer_if_complete(id)

    def _begin_tiles(self, job: Job, image: Image) -> None:
        """Let the tiles of a drawn image wait for slots."""
        self._progress[job.id].drawn[image.index] = image
        self.scheduler.add_rows(job.id, job.tile_rows(image.index))
        steps = job.passes[0][1]
        if steps in job.preview_steps:
            number = job.preview_steps.index(steps)
            send_message(self.connection, Preview(job.id, number, steps, image))

    def _add_tile(self, job: Job, image: int, number: int, tile: DecodedImage) -> None:
        """Add a tile to its image; send the image when all of its tiles have come as far."""
        assert job.enlarge is not None
        finished = len(job.preview_steps)
        mosaics = self._progress[job.id].mosaics
        mosaic = mosaics.setdefault(image, Mosaic(job.enlarge.tiling))
        stage = finished if tile.preview is None else tile.preview
        reached = mosaic.put(number, stage, tile.image.array)
        if reached is None:
            return
        blended = Image(image, *job.drawn_size, mosaic.blend().tobytes())
        if reached < finished:
            step = job.preview_steps[reached]
            send_message(self.connection, Preview(job.id, reached, step, blended))
        else:
            del mosaics[image]
            self._add_image(job, blended)

    def _add_image(self, job: Job, image: Image) -> None:
        progress = self._progress[job.id]
        progress.images.append(image)
        if job.early:
            send_message(self.connection, Drawn(job.id, image, progress.truncated))

    def _answer_if_complete(self, id: str) -> None:
        progress = self._progress[id]
        if len(progress.images) == len(self.scheduler.job(id).seeds):
            answer = Finished(
                id,
                tuple(progress.images),
                progress.timings(),
                progress.truncated,
                progress.step_seconds(),
            )
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
        return self.scheduler.job(id).row_steps - self._progress[id].steps

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
            left={
                id: self._steps_left(id)
                for id, each in self._progress.items()
                if each.started_at is not None
            },
            stats=process_stats(self.runner.device),
        )
        send_message(self.connection, heartbeat)
        self._steps.clear()
        self._counts_sent, self._heartbeat_at = counts, now


def process_stats(device: torch.device) -> ProcessStats:
    """Return this process's memory, processor time, threads, and memory of its device."""
    device_bytes = _device_bytes(device) if device.type == "cuda" else {}
    return ProcessStats(
        resident_bytes(), time.process_time(), torch.get_num_threads(), device_bytes
    )


def _device_bytes(device: torch.device) -> dict[str, int]:
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def main(
    connection: Connection, settings: Settings, make_runner: Callable[[Settings], Runner] = Runner
) -> None:
    """Load the weights and serve until told to stop.

    make_runner: loads the weights; its errors are raised.
    """
    prepare(settings.threads)
    try:
        runner = make_runner(settings)
        runner.warm_up()
        runner.choose_threads()
        _serve(connection, runner, settings)
    except torch.AcceleratorError as error:
        log.critical("device failed", exc_info=True)
        with contextlib.suppress(OSError):
            send_message(connection, Crashed(f"the device failed: {describe(error)}", False))
        # An orderly exit would free tensors on a device that answers to nothing any more, and may
        # hang in it.
        os._exit(DEVICE_FAILED)


def _serve(connection: Connection, runner: Runner, settings: Settings) -> None:
    # Several heartbeats within the timeout.
    idle_heartbeat_s = min(_IDLE_HEARTBEAT_S, settings.stall_timeout_s / 4)
    try:
        dtype = str(runner.dtype).removeprefix("torch.")
        ready = Ready(
            str(runner.device),
            dtype,
            torch.get_num_threads(),
            compiled=any(each.compiled for each in runner.pipelines.values()),
        )
        send_message(connection, ready)
        Worker(connection, runner, settings.max_batch_rows, idle_heartbeat_s).run()
    except (EOFError, BrokenPipeError):
        log.warning("API process gone")
