"""Start a worker's operating-system process, exchange messages with it, and end it.

The API process never imports torch: the worker's code is imported in the child process, which
begins in `server/engine/child.py`. Unlike multiprocessing's, it imports nothing from the directory
that the server was started in, runs after that directory is deleted, and ends with the API process.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

from server.engine.cpu_environment import limit_kernel_cache, limit_spin_count, worker_environment
from server.engine.messages import FromWorker, Stop, ToWorker, receive_message, send_message
from server.settings import Settings

log = logging.getLogger(__name__)

WorkerMain = Callable[[Connection, Settings], None]

EXIT_GRACE_S = 5.0


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
