"""Keep one worker process alive: start it, detect a crash or a stall, replace it.

The listener learns of lost jobs, and which of them are suspects.

The API process never imports torch: the worker's code is imported in the child process, which
begins in `server/engine/child.py`. Unlike multiprocessing's, it imports nothing from the directory
that the server was started in, runs after that directory is deleted, and ends with the API process.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes.util
import functools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

from server.engine.messages import (
    Cancel,
    Crashed,
    Drawn,
    Dropped,
    Failed,
    Finished,
    FromWorker,
    Heartbeat,
    Job,
    Preview,
    Ready,
    Running,
    ShareCPU,
    Stop,
    ToWorker,
    receive_message,
    send_message,
)
from server.metrics import Metrics, WorkerState
from server.settings import Settings

log = logging.getLogger(__name__)

# The messages that concern jobs, and are passed on.
WorkerMessage = Running | Preview | Drawn | Finished | Failed | Heartbeat
WorkerMain = Callable[[Connection, Settings], None]

EXIT_GRACE_S = 5.0
FIRST_RESTART_DELAY_S = 0.1
LAST_RESTART_DELAY_S = 30.0

# OpenMP's spin count, measured: a smaller one slows an undisturbed step, a larger one a disturbed
# step (docs/log.md).
SPIN_COUNT = 10_000
# Entries of PyTorch's cache of CPU kernels, each for one shape and up to megabytes large. Its
# default, 1024, took 600 MiB after 130 image sizes; few entries made no step slower (docs/log.md).
KERNEL_CACHE_ENTRIES = 16


def limit_spin_count() -> None:
    """Let waiting OpenMP threads sleep sooner; call it before torch is imported.

    By default they spin for longer than the kernel lets another process compute, and take the cores
    from the threads that they wait for. The environment's own settings take precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def limit_kernel_cache() -> None:
    """Bound PyTorch's cache of CPU kernels; call it before torch computes.

    The environment's own setting takes precedence.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNEL_CACHE_ENTRIES))


@functools.cache
def faster_allocator() -> str | None:
    """Return the name of tcmalloc's library, by which the loader finds it; None if not installed.

    A step on a CPU takes a third less time with it than with glibc's malloc (docs/log.md).
    """
    if sys.platform != "linux":
        return None
    for name in ("tcmalloc_minimal", "tcmalloc"):
        if found := ctypes.util.find_library(name):
            return found
    return None


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: this process's, and tcmalloc preloaded if installed.

    An allocator must be there before a process begins, so the worker cannot choose it by itself.
    The environment's own `LD_PRELOAD` takes precedence, an empty one too.
    """
    environment = dict(os.environ)
    if "LD_PRELOAD" not in environment and (allocator := faster_allocator()):
        environment["LD_PRELOAD"] = allocator
        # It would write a line to the log, not in the log's format, for each large tensor.
        environment.setdefault("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD", str(1 << 62))
    return environment


def run_worker(connection: Connection, settings: Settings) -> None:
    """Run a worker in this process, which has no torch before."""
    limit_spin_count()
    limit_kernel_cache()
    from server.engine.worker import main

    main(connection, settings)


# The process's first code. Its arguments: the pipe's descriptor, the API process's number, and the
# directories to import from, which are not searched for the standard library before.
_BOOTSTRAP = (
    "import sys; pipe, parent, *sys.path = sys.argv[1:];"
    " from server.engine.child import enter, run; enter(int(parent)); run(int(pipe))"
)


class WorkerProcess:
    """A started child process.

    Sending and receiving have a thread each, since a pipe blocks when its other end is busy and the
    event loop must not. exited: its exit code (negative: a signal's number), once it has exited and
    every message it sent has been passed to `on_message`.
    """

    def __init__(
        self, main: WorkerMain, settings: Settings, on_message: Callable[[FromWorker], None]
    ) -> None:
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._on_message = on_message
        self._first = (*_import_name(main), settings)
        self._outbox: SimpleQueue[ToWorker | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="worker-sender", daemon=True)
        self._receiver = threading.Thread(
            target=self._receive_all, name="worker-receiver", daemon=True
        )

    def start(self) -> None:
        """Start the process. Raises OSError if the system grants none, or no threads for it.

        The process ends with the thread that calls this, which is the event loop's.
        """
        self._connection, far_end = Pipe()
        try:
            self._process = _popen(far_end)
        except BaseException:
            self._connection.close()
            raise
        finally:
            # The pipe reports the child's end only if no other process holds the child's side of
            # it.
            far_end.close()
        atexit.register(self.kill)
        with contextlib.suppress(OSError):
            self._connection.send(self._first)
        try:
            self._sender.start()
            self._receiver.start()
        except RuntimeError as error:
            self.kill()
            self._reap()
            raise OSError("no thread for the worker's messages") from error

    def send(self, message: ToWorker) -> None:
        """Queue the message.

        A message to a worker that has exited is lost; `exited` reports the exit.
        """
        self._outbox.put(message)

    @property
    def pid(self) -> int:
        """Return the number of the started process."""
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """Ask the worker to exit; kill it after `grace_s`."""
        self.send(Stop())
        await asyncio.wait([self.exited], timeout=grace_s)
        if not self.exited.done():
            self.kill()
            await self.exited

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):
                send_message(self._connection, message)

    def _receive_all(self) -> None:
        loop = self.exited.get_loop()
        try:
            while True:
                loop.call_soon_threadsafe(self._on_message, receive_message(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("worker killed: unreadable message")
            self.kill()
        self._reap()
        # The loop is closed already when an interpreter exits without having stopped the client.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self.exited.set_result, self._process.returncode)

    def _reap(self) -> None:
        try:
            self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        atexit.unregister(self.kill)
        self._outbox.put(None)
        if self._sender.is_alive():
            self._sender.join()
        self._connection.close()
        if self._process.stdin:
            self._process.stdin.close()


def _popen(pipe: Connection) -> subprocess.Popen[bytes]:
    """Start the interpreter. Its standard input ends when this process does."""
    directory = _current_directory()
    path = (entry or directory or "/" for entry in sys.path)
    descriptor = pipe.fileno()
    # -P: the start directory is not searched for modules.
    command = [sys.executable, "-P", "-c", _BOOTSTRAP, str(descriptor), str(os.getpid()), *path]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        pass_fds=[descriptor],
        cwd=None if directory else "/",
        env=worker_environment(),
    )


def _current_directory() -> str | None:
    """Return the current directory, None if it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _import_name(main: WorkerMain) -> tuple[str, str]:
    """Return the function's module and name, by which the process imports it.

    Raises ValueError for a function that no module has.
    """
    module, name = main.__module__, main.__qualname__
    if module == "__main__":  # run by `python -m`
        module = getattr(sys.modules[module].__spec__, "name", "")
    if not module or "." in name:
        raise ValueError(f"the worker's main function must be importable; {name} is not")
    return module, name


# ── its supervisor ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's state: whether a job sent now would be started, and if not, why.

    device, dtype: the worker's, None before it is first ready. fatal: why no worker can be started
    any more: the first start failed and every other would too, or the supervisor itself failed.
    """

    ready: bool
    reason: str
    device: str | None = None
    dtype: str | None = None
    fatal: str | None = None


class Listener(Protocol):
    """The receiver of a supervisor's events, called on the event loop."""

    def on_worker_ready(self, worker: Supervisor) -> None:
        """Handle a worker that accepts jobs from now on."""

    def on_rows_owed(self, worker: Supervisor) -> None:
        """Handle a change of what the worker has to compute, before it learns of it."""

    def on_worker_message(self, worker: Supervisor, message: WorkerMessage) -> None:
        """Handle a message about jobs."""

    def on_worker_lost(
        self, worker: Supervisor, reason: str, unfinished: frozenset[str], suspects: frozenset[str]
    ) -> None:
        """Handle the loss of unfinished jobs.

        suspects: those of them in the stage in which the worker died.
        """


class Supervisor:
    """A sequence of workers on one device, one alive at a time."""

    def __init__(
        self, main: WorkerMain, settings: Settings, metrics: Metrics, listener: Listener
    ) -> None:
        self._main, self._settings = main, settings
        self._metrics, self._listener = metrics, listener
        self._status = WorkerStatus(ready=False, reason="starting")
        self._failure: str | None = None  # why workers are no longer watched and replaced
        self._tasks: list[asyncio.Task[None]] = []
        self.last_heartbeat = Heartbeat((), 0, 0)
        self.failures = 0
        # Rows of the jobs that the worker has not answered, cancelled ones included.
        self._owed: dict[str, int] = {}
        self._sharing = 1  # workers on its CPU, as it was told
        self._was_ready = False
        self._cancelled_at: dict[str, float] = {}
        self._running: tuple[str, ...] = ()
        self._started_at = 0.0
        # The worker's last message; None while it is not ready. An idle worker sends heartbeats.
        self._heard_at: float | None = None
        # Why this worker ends: its own last message, or the supervisor's for killing it.
        self._crash: Crashed | None = None
        self._killed_for: str | None = None

    async def start(self) -> None:
        """Start the first worker and return before it is ready.

        Raises OSError if the system grants no process.
        """
        self._worker = self._start_worker()
        self._tasks = [
            asyncio.create_task(self._keep_alive()),
            asyncio.create_task(self._watch()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_ended)

    async def stop(self) -> None:
        """Stop the worker, if one was started; it is not replaced."""
        if not self._tasks:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # One that is not ready is loading weights and reads no messages.
        await self._worker.stop(EXIT_GRACE_S if self._status.ready else 0)

    @property
    def status(self) -> WorkerStatus:
        """The worker's state, for probes and for dispatching."""
        if self._failure:
            return replace(self._status, ready=False, reason=self._failure, fatal=self._failure)
        if self._status.ready and self._stalled:
            return WorkerStatus(False, self._silence, self._status.device, self._status.dtype)
        return self._status

    @property
    def state(self) -> WorkerState:
        """The worker's figures for /metrics."""
        silent_s = 0.0 if self._heard_at is None else time.monotonic() - self._heard_at
        return WorkerState(self.status.ready, silent_s, self.last_heartbeat.stats)

    @property
    def accepting(self) -> bool:
        """Return whether the worker reads jobs, at once or after its current step."""
        return self._status.ready

    @property
    def pid(self) -> int | None:
        """Return the number of the present worker's process."""
        return self._worker.pid

    @property
    def rows_owed(self) -> int:
        """Rows that the worker has not answered."""
        return sum(self._owed.values())

    def send(self, job: Job) -> None:
        """Send the worker a job."""
        self._owed[job.id] = job.rows
        self._listener.on_rows_owed(self)
        self._worker.send(job)

    @property
    def computes_on_cpu(self) -> bool:
        """Return whether it has something to compute, on the CPU."""
        return bool(self._owed) and self._status.device == "cpu"

    def share_cpu(self, workers: int) -> None:
        """Tell the worker how many workers compute on its CPU, unless it knows."""
        if workers != self._sharing:
            self._sharing = workers
            self._worker.send(ShareCPU(workers))

    def cancel(self, id: str) -> None:
        """Free the job's slots at the next step, if the worker has it."""
        if id in self._owed and id not in self._cancelled_at:
            self._cancelled_at[id] = time.monotonic()
            self._worker.send(Cancel(id))

    # ── messages ──────────────────────────────────────────────────────────────────────────────────

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Ready(device, dtype):
                self._status = WorkerStatus(True, "ready", device, dtype)
                self._was_ready = True
                self._listener.on_worker_ready(self)
            case Crashed():
                self._crash = message
            case Finished(id=id) | Failed(id=id):
                self.failures = 0
                self._answered(id)
                self._listener.on_worker_message(self, message)
            case Dropped(id):
                self._answered(id)
                if cancelled_at := self._cancelled_at.pop(id, None):
                    self._metrics.cancel_duration.observe(time.monotonic() - cancelled_at)
            case Running(jobs):
                self._running = jobs
                self._listener.on_worker_message(self, message)
            case Preview() | Drawn():
                self._listener.on_worker_message(self, message)
            case Heartbeat():
                self.last_heartbeat = message
                self._listener.on_worker_message(self, message)
        self._heard_at = time.monotonic() if self._status.ready else None

    def _answered(self, id: str) -> None:
        if self._owed.pop(id, None) is not None:
            self._listener.on_rows_owed(self)

    # ── crashes and stalls ────────────────────────────────────────────────────────────────────────

    @property
    def _stalled(self) -> bool:
        if self._heard_at is None:
            return False
        return time.monotonic() - self._heard_at > self._settings.stall_timeout_s

    @property
    def _silence(self) -> str:
        return f"the worker has not answered for {self._settings.stall_timeout_s:g} s"

    @property
    def _start_expired(self) -> bool:
        loading = not self._status.ready and not self._worker.exited.done()
        return loading and time.monotonic() - self._started_at > self._settings.start_timeout_s

    def _start_worker(self) -> WorkerProcess:
        worker = WorkerProcess(self._main, self._settings, self._on_message)
        worker.start()
        self._started_at, self._crash, self._killed_for = time.monotonic(), None, None
        return worker

    async def _keep_alive(self) -> None:
        """Replace every worker that exits, each time after a longer delay."""
        while True:
            code = await asyncio.shield(self._worker.exited)
            self._lose(self._reason(code))
            while True:
                self.failures += 1
                await asyncio.sleep(
                    min(LAST_RESTART_DELAY_S, FIRST_RESTART_DELAY_S * 2**self.failures)
                )
                try:
                    self._worker = self._start_worker()
                    break
                except OSError:
                    log.exception("worker not started")
            self._metrics.worker_restarts.inc()

    def _on_task_ended(self, task: asyncio.Task[None]) -> None:
        """Report an error that ended the supervision, since nobody awaits its tasks."""
        if task.cancelled() or not (error := task.exception()):
            return
        log.error("worker supervision failed", exc_info=error)
        self._failure = f"worker supervision failed: {error!r}"

    def _reason(self, code: int | None) -> str:
        """Return why the worker has exited, in words."""
        if self._killed_for:
            return f"{self._killed_for} and was killed"
        if self._crash:
            event = "crashed" if self._status.ready else "did not start"
            return f"the worker {event}: {self._crash.reason}"
        return f"the worker exited with code {code}"

    def _lose(self, reason: str) -> None:
        unfinished = frozenset(self._owed) - self._cancelled_at.keys()
        suspects = unfinished & frozenset(self._running)
        fields = {"reason": reason, "unfinished": len(unfinished), "suspects": sorted(suspects)}
        log.error("worker lost", extra={"fields": fields})
        first = not self._was_ready and not self.failures
        fatal = reason if first and self._crash and self._crash.lasting else None
        self._status = WorkerStatus(False, f"{reason}; another is starting", fatal=fatal)
        self._owed, self._cancelled_at, self._sharing = {}, {}, 1
        self._running = ()
        self._heard_at, self.last_heartbeat = None, Heartbeat((), 0, 0)
        self._listener.on_rows_owed(self)
        self._listener.on_worker_lost(self, reason, unfinished, suspects)

    async def _watch(self) -> None:
        """Kill a worker that is silent, or not ready, for too long."""
        interval = min(self._settings.stall_timeout_s, self._settings.start_timeout_s) / 4
        while True:
            began = time.monotonic()
            await asyncio.sleep(interval)
            if time.monotonic() - began > 2 * interval:
                # This process stood still, and the worker's messages are yet to be read.
                self._heard_at = self._heard_at and time.monotonic()
            elif self._stalled:
                self._kill("worker stalled", self._silence)
            elif self._start_expired:
                limit = f"{self._settings.start_timeout_s:g} s"
                self._kill("worker start timed out", f"the worker was not ready after {limit}")

    def _kill(self, event: str, reason: str) -> None:
        if self._killed_for is None:
            log.error(event, extra={"fields": {"reason": reason}})
        self._killed_for = reason
        self._worker.kill()
