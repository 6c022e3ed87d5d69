"""Trace one `POST /generate` and print the project files that it passes, in the API process and in
the worker.

    python -m load_tests.trace_request

A file counts when one of its functions is called between the request's arrival and its answer.
Module bodies, and files that only define types, do not count: a reader never opens them to follow
the request. Exits with 1 if more files than `--limit` are passed. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import httpx
import uvicorn

from load_tests.processes import workers
from server.api import create_app
from server.engine.worker_process import run_worker
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "model")
LIMIT = 30
# The file to which the worker process writes what it passed.
WORKER_FILES = "TRACE_WORKER_FILES"
# The signal that starts the worker's recording, and, sent again, ends it.
TOGGLE = signal.SIGUSR1
_TIMEOUT_S = 300.0


class CallRecorder:
    """Record the project files whose functions are called while `recording` is true."""

    def __init__(self) -> None:
        self.recording = False
        self.files: set[str] = set()

    def install(self) -> None:
        """Watch this thread, and every thread that is started from now on."""
        sys.setprofile(self._on_event)
        threading.setprofile(self._on_event)

    def project_files(self) -> list[str]:
        """Return the recorded files of `PACKAGES`, relative to the project's root, sorted."""
        paths = [Path(name) for name in self.files]
        inside = [path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)]
        return sorted(str(path) for path in inside if path.parts[0] in PACKAGES)

    def _on_event(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if self.recording and event == "call" and code.co_name != "<module>":
            self.files.add(code.co_filename)


def traced_worker(connection: Connection, settings: Settings) -> None:
    """Run the worker process; write the recorded files when the second `TOGGLE` arrives."""
    recorder = CallRecorder()
    recorder.install()

    def toggle(*_: object) -> None:
        recorder.recording = not recorder.recording
        if not recorder.recording:
            Path(os.environ[WORKER_FILES]).write_text(json.dumps(recorder.project_files()))

    signal.signal(TOGGLE, toggle)
    run_worker(connection, settings)


def trace() -> dict[str, list[str]]:
    """Return the passed files by process, for the embedded weights. Raises TimeoutError."""
    recorder = CallRecorder()
    recorder.install()
    with tempfile.TemporaryDirectory() as directory:
        worker_files = Path(directory) / "worker.json"
        os.environ[WORKER_FILES] = str(worker_files)
        with _serving(Settings(port=0)) as address:
            _wait_for(lambda: httpx.get(f"{address}/readyz").status_code == 200)
            (worker,) = workers(os.getpid())
            os.kill(worker, TOGGLE)
            recorder.recording = True
            answer = httpx.post(f"{address}/generate", json={"prompt": "a red apple"}, timeout=60)
            recorder.recording = False
            os.kill(worker, TOGGLE)
            answer.raise_for_status()
            _wait_for(lambda: worker_files.exists() and worker_files.stat().st_size > 0)
            return {"api": recorder.project_files(), "worker": json.loads(worker_files.read_text())}


@contextmanager
def _serving(settings: Settings) -> Iterator[str]:
    """Serve in a thread; give the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(settings, worker=traced_worker), log_config=None, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        _wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not get there in time")
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.trace_request", description=__doc__)
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"files at most, {LIMIT} by default"
    )
    limit = parser.parse_args(arguments).limit
    files = trace()
    distinct = sorted({name for names in files.values() for name in names})
    for process, names in files.items():
        print(f"{process}: {len(names)} files", *names, sep="\n  ")
    print(
        json.dumps(
            {"api": len(files["api"]), "worker": len(files["worker"]), "files": len(distinct)}
        )
    )
    return int(len(distinct) > limit)


if __name__ == "__main__":
    sys.exit(main())
