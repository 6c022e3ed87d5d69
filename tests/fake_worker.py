"""A worker without a model: it answers with pictures of one colour, chosen by the seed, and does
what the prompt's first word says.

`hold` keeps the job until it is cancelled, `show-hold` after its previews; `slow` takes SLOW_S;
`hang` goes silent for ever; `die` exits at once; `fail`, `oom` and `late` answer Failed; `show`
sends two previews; `half` dies in the midst of its answer, and `half-show` after the first of two
previews, but not if it is alone; `cut` says that both encoders truncated the prompt; `noise`
answers with pictures that no file format makes small.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import random
import time
from multiprocessing.connection import Connection

from server.engine.job import Job
from server.engine.messages import (
    Cancel,
    Drawn,
    Dropped,
    Failed,
    Finished,
    Heartbeat,
    Image,
    Preview,
    ProcessStats,
    Ready,
    Running,
    Step,
    Stop,
    Timings,
    ToWorker,
    receive_message,
    send_message,
)
from server.settings import Settings

SLOW_S = 0.15
IDLE_HEARTBEAT_S = 0.1
EXIT_CODE = 3
LOADING = "the fake worker is loading"
FAILURES: dict[str, Failed] = {
    "fail": Failed("", "internal", "/home/someone/model.py: Traceback", retryable=False),
    "oom": Failed("", "out_of_memory", "CUDA out of memory", retryable=True),
    "late": Failed("", "deadline", "would finish too late", retryable=True),
}


def main(connection: Connection, settings: Settings) -> None:
    send_message(connection, Ready("fake", "float32"))
    held: dict[str, Job] = {}
    try:
        while not isinstance(message := next_message(connection, held), Stop):
            take(connection, held, message)
            running = sum(len(job.seeds) for job in held.values())
            send_message(
                connection,
                Heartbeat(
                    (Step(1, 1, 32 * 16, 0.0001),),
                    running,
                    0,
                    {("prompt_cache_hits", "text"): 1},
                    stats=stats(),
                ),
            )
    except EOFError:
        pass


def next_message(connection: Connection, held: dict[str, Job]) -> ToWorker:
    """The next message; heartbeats meanwhile."""
    while not connection.poll(IDLE_HEARTBEAT_S):
        running = sum(len(job.seeds) for job in held.values())
        send_message(connection, Heartbeat((), running, 0, stats=stats()))
    message: ToWorker = receive_message(connection)
    return message


def stats() -> ProcessStats:
    """As if it had as many bytes as its process has a number, so that tests can tell one from the
    next.
    """
    return ProcessStats(os.getpid(), time.process_time(), 1, {"allocated": 1})


def take(connection: Connection, held: dict[str, Job], message: ToWorker) -> None:
    match message:
        case Cancel(id):
            held.pop(id, None)
            send_message(connection, Dropped(id))
        case Job():
            answer(connection, held, message)


def answer(connection: Connection, held: dict[str, Job], job: Job) -> None:
    word = next(iter(" ".join(job.prompts).split()), "")
    send_message(connection, Running((job.id,) if job.alone else (*held, job.id)))
    if word.endswith("hold"):
        if word == "show-hold":
            show(connection, job, at_most=job.previews)
        held[job.id] = job
    elif word == "hang":
        time.sleep(3600)
    elif word == "die":
        os._exit(EXIT_CODE)
    elif word == "half" and not job.alone:
        send_half(connection, finished(job))
        os._exit(EXIT_CODE)
    elif word in FAILURES:
        failure = FAILURES[word]
        send_message(connection, Failed(job.id, failure.code, failure.message, failure.retryable))
    else:
        if word.endswith("show"):
            show(connection, job, at_most=2 if job.alone or word == "show" else 1)
        time.sleep(SLOW_S if word == "slow" else 0)
        for image in finished(job).images if job.early else ():
            send_message(connection, Drawn(job.id, image))
        send_message(connection, finished(job, ("byt5", "clip") if word == "cut" else ()))


def finished(job: Job, truncated: tuple[str, ...] = ()) -> Finished:
    images = tuple(
        Image(i, *job.drawn_size, picture(job, seed)) for i, seed in enumerate(job.seeds)
    )
    # Last image first: nothing promises an order.
    return Finished(
        job.id,
        images[::-1],
        Timings(queue=0.001, encode=0.002, prior=0.003, denoise=0.004, decode=0.005),
        truncated,
        (0.006, 0.009) if job.traceparent else (),
    )


def picture(job: Job, seed: int) -> bytes:
    pixels = math.prod(job.drawn_size)
    if job.prompts[:1] == ("noise",):
        return random.Random(seed).randbytes(3 * pixels)
    return colour(seed) * pixels


def show(connection: Connection, job: Job, at_most: int) -> None:
    for number in range(at_most):
        send_message(
            connection,
            Preview(
                job.id,
                number,
                number + 1,
                Image(0, job.width, job.height, colour(number) * (job.width * job.height)),
            ),
        )
    if at_most == 1:
        os._exit(EXIT_CODE)


def send_half(connection: Connection, message: Finished) -> None:
    """All but the last pixels."""
    header = pickle.dumps(message, protocol=5, buffer_callback=lambda _: None)
    connection.send((header, len(message.images)))
    for image in message.images[:-1]:
        connection.send_bytes(image.pixels)


def colour(seed: int) -> bytes:
    """Three bytes that differ from seed to seed."""
    return hashlib.sha256(str(seed).encode()).digest()[:3]


def dead_on_arrival(connection: Connection, settings: Settings) -> None:
    """A worker that never becomes ready."""
    os._exit(EXIT_CODE)


def slow_to_start(connection: Connection, settings: Settings) -> None:
    """A worker that is loading for longer than any test waits; it logs LOADING when it begins."""
    logging.getLogger(__name__).warning(LOADING)
    time.sleep(3600)


def out_of_memory(connection: Connection, settings: Settings) -> None:
    """A worker that fails for a reason that may pass."""
    raise MemoryError("all of it\nis taken")
