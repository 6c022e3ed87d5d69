"""A worker's process, played by the test: its start, its messages, its end and what they leave."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Never

import pytest

from server.engine.messages import Cancel, Stop, receive_message
from server.engine.worker_process import EXIT_GRACE_S, WorkerMain, WorkerProcess
from server.settings import Settings
from tests import fake_worker

PATIENCE_S = 60


class Child:
    """A child process, played by the test.

    end: its end of the pipe. returncode: None while it runs. waits: how long others waited for its
    exit. at_exit: what was to be done, and what was no longer to be done, at the interpreter's
    exit.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.returncode: int | None = None
        self.stdin = io.BytesIO()
        self.waits: list[float | None] = []
        self.ends: tuple[Connection, Connection] = Pipe()
        self.at_exit: list[tuple[str, object]] = []
        self._closing = threading.Lock()
        replaced = {
            "Pipe": lambda: self.ends,
            "subprocess.Popen": self.start,
            "worker_environment": dict,
            "atexit.register": lambda function: self.at_exit.append(("do", function)),
            "atexit.unregister": lambda function: self.at_exit.append(("do not", function)),
        }
        for name, function in replaced.items():
            monkeypatch.setattr(f"server.engine.worker_process.{name}", function)

    def start(self, *_: object, **__: object) -> Child:
        self.end = Connection(os.dup(self.ends[1].fileno()))
        return self

    def wait(self, timeout: float | None = None) -> int:
        self.waits.append(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self.returncode

    def exit(self, code: int) -> None:
        self.returncode = code
        self.close()

    def close(self) -> None:
        """Close its end. A thread that sees this may kill it before this has returned."""
        with self._closing:
            self.end.close()

    def kill(self) -> None:
        self.exit(-9)


def started(
    monkeypatch: pytest.MonkeyPatch, main: WorkerMain = fake_worker.main
) -> tuple[WorkerProcess, Child]:
    child = Child(monkeypatch)
    process = WorkerProcess(main, Settings(), lambda _: None)
    process.start()
    return process, child


async def exit_code(process: WorkerProcess) -> int | None:
    async with asyncio.timeout(PATIENCE_S):
        return await process.exited


async def test_a_process_that_the_system_refuses_leaves_no_pipe_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[Connection] = []

    def pipe() -> tuple[Connection, Connection]:
        ends.extend(Pipe())
        return ends[0], ends[1]

    def refuse(*_: object, **__: object) -> Never:
        raise OSError("no process")

    monkeypatch.setattr("server.engine.worker_process.Pipe", pipe)
    monkeypatch.setattr("server.engine.worker_process.subprocess.Popen", refuse)
    monkeypatch.setattr("server.engine.worker_process.worker_environment", dict)
    process = WorkerProcess(fake_worker.main, Settings(), lambda _: None)
    with pytest.raises(OSError, match="no process"):
        process.start()
    assert [end.closed for end in ends] == [True, True]


async def test_what_a_process_held_is_closed_when_it_has_exited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, child = started(monkeypatch)
    child.exit(3)
    assert await exit_code(process) == 3
    assert child.waits == [EXIT_GRACE_S]
    assert child.stdin.closed
    assert [end.closed for end in child.ends] == [True, True]
    # A server that ends without having stopped its worker kills it.
    assert child.at_exit == [("do", process.kill), ("do not", process.kill)]


@pytest.mark.parametrize("refused", ["worker-sender", "worker-receiver"])
async def test_a_process_whose_threads_the_system_refuses_is_killed_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = set(threading.enumerate())  # other tests' servers may have a worker of their own
    child = Child(monkeypatch)
    process = WorkerProcess(fake_worker.main, Settings(), lambda _: None)
    monkeypatch.setattr("server.engine.worker_process.threading.Thread.start", start_or_refuse)
    with pytest.raises(OSError, match="no thread"):
        process.start()
    assert child.returncode == -9
    assert child.stdin.closed
    assert [end.closed for end in child.ends] == [True, True]
    assert child.at_exit == [("do", process.kill), ("do not", process.kill)]
    left = {thread.name for thread in threading.enumerate() if thread not in before}
    assert "worker-sender" not in left


async def test_a_process_that_closes_its_pipe_and_does_not_exit_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, child = started(monkeypatch)
    child.close()
    assert await exit_code(process) == -9
    assert child.waits == [EXIT_GRACE_S, None]


async def test_a_process_that_sends_what_is_no_message_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process, child = started(monkeypatch)
    child.end.send_bytes(b"no message")
    assert await exit_code(process) == -9
    assert child.waits == [EXIT_GRACE_S], "it was killed before"
    assert "worker killed: unreadable message" in [record.msg for record in caplog.records]


async def test_a_process_that_stops_as_it_is_asked_to_is_not_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, child = started(monkeypatch)
    module, name, _ = child.end.recv()
    assert (module, name) == ("tests.fake_worker", "main")
    stopping = asyncio.create_task(process.stop(2 * PATIENCE_S))
    assert await asyncio.to_thread(child.end.poll, PATIENCE_S)
    assert receive_message(child.end) == Stop()
    child.exit(0)
    async with asyncio.timeout(PATIENCE_S):
        await stopping
    assert process.exited.result() == 0


async def test_a_process_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = started(monkeypatch)
    async with asyncio.timeout(PATIENCE_S):
        await process.stop(0.01)
    assert process.exited.result() == -9


async def test_the_pipe_is_closed_only_when_no_message_is_being_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sending, go_on, closed = threading.Event(), threading.Event(), list[bool]()

    def send(connection: Connection, _: object) -> None:
        sending.set()
        assert go_on.wait(PATIENCE_S)
        closed.append(connection.closed)

    monkeypatch.setattr("server.engine.worker_process.send_message", send)
    process, child = started(monkeypatch)
    process.send(Cancel("a"))
    assert await asyncio.to_thread(sending.wait, PATIENCE_S)
    child.exit(0)
    # Enough to close the pipe, if nothing kept it open.
    await asyncio.wait([process.exited], timeout=0.1)
    go_on.set()
    assert await exit_code(process) == 0
    assert closed == [False]


async def test_a_worker_s_main_function_must_have_a_name_in_a_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(connection: Connection, settings: Settings) -> None:
        """Never called."""

    with pytest.raises(ValueError, match="must be importable"):
        WorkerProcess(main, Settings(), lambda _: None)
    main.__module__, main.__qualname__ = "__main__", "main"
    file = SimpleNamespace(__spec__=None)
    monkeypatch.setitem(sys.modules, "__main__", file)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be importable"):
        WorkerProcess(main, Settings(), lambda _: None)
    # As `python -m tests.fake_worker` has it.
    file.__spec__ = SimpleNamespace(name="tests.fake_worker")
    process, child = started(monkeypatch, main)
    assert child.end.recv()[:2] == ("tests.fake_worker", "main")
    child.exit(0)
    assert await exit_code(process) == 0
