"""A worker in a thread, seen from the API process's end of its pipe, and jobs for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from model.config import SamplingConfig
from server.engine.cuda_streams import Mark
from server.engine.job import Job
from server.engine.messages import (
    Failed,
    Finished,
    FromWorker,
    Preview,
    Stop,
    ToWorker,
    receive_message,
    send_message,
)
from server.engine.runner import Runner
from server.engine.worker import Worker

PATIENCE_S = 60
SAMPLING = SamplingConfig(
    steps=4,
    renoise_steps=3,
    guidance=(4.0, 4.0),
    guidance_steps=4,
    temperature=(0.7, 0.3),
    sampler="multinomial",
    typical_mass=0.2,
)


def job(
    id: str, prompt: str = "red apple", seeds: tuple[int, ...] = (0,), **changes: object
) -> Job:
    made = Job(
        id, "random", prompt, "", 32, 32, seeds, SAMPLING, deadline=time.monotonic() + PATIENCE_S
    )
    return replace(made, **changes)


@dataclass
class Far:
    """The API process's end of a running worker."""

    connection: Connection
    runner: Runner
    thread: threading.Thread

    def send(self, message: ToWorker) -> None:
        send_message(self.connection, message)

    def receive(self, wanted: Callable[[FromWorker], bool]) -> FromWorker:
        """The next message that is wanted; beats and others are passed over."""
        deadline = time.monotonic() + PATIENCE_S
        while self.connection.poll(max(0.0, deadline - time.monotonic())):
            if wanted(message := receive_message(self.connection)):
                return message
        raise TimeoutError("the worker says nothing")

    def answer(self, id: str) -> Finished | Failed:
        message = self.receive(lambda m: isinstance(m, Finished | Failed) and m.id == id)
        assert isinstance(message, Finished | Failed)
        return message

    def stop(self) -> None:
        self.send(Stop())
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@pytest.fixture(name="far")
def far_fixture(runner: Runner) -> Iterator[Far]:
    near, connection = Pipe()
    thread = threading.Thread(target=Worker(near, runner, max_rows=4).run)
    thread.start()
    far = Far(connection, runner, thread)
    yield far
    far.stop()
    near.close()
    connection.close()


class Gate:
    """Holds the runner inside a step until it is opened, so that a test can say what happened
    before the next one.
    """

    def __init__(self, far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        step = far.runner.step

        def gated(model, rows):
            self.entered.set()
            assert self.opened.wait(PATIENCE_S)
            return step(model, rows)

        monkeypatch.setattr(far.runner, "step", gated)

    def wait(self) -> None:
        assert self.entered.wait(PATIENCE_S)


def shown(far: Far, id: str) -> tuple[list[Preview], Finished]:
    """A job's previews in the order in which they came, and its answer."""
    previews: list[Preview] = []
    while not isinstance(
        message := far.receive(lambda m: isinstance(m, Preview | Finished | Failed) and m.id == id),
        Finished,
    ):
        assert isinstance(message, Preview)
        previews.append(message)
    return previews, message


class LateMark(Mark):
    """A decode that is done once `passed` is set."""

    passed = False

    def __init__(self) -> None:
        super().__init__(None)
