"""Define the messages between the API process and its workers, and send them over a pipe.

Messages are plain frozen dataclasses, no torch. A message crosses the pipe as a small pickle,
followed by the pixels as they lie in memory. Shared memory is not used: a segment outlives a worker
that is killed before it names the segment, and page faults of a new one cost more than the pipe's
copies. A message is received as a whole or, if its sender dies while sending it, not at all.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal, SupportsIndex

import numpy as np

from model.canvas import Pixels
from model.config import DENOISER
from model.image_request import out_of_band
from server.engine.job import Job

FailureCode = Literal["deadline", "internal", "out_of_memory"]

# A worker's counters: the metric's name and the value of its label, "" where it has none.
Count = tuple[
    Literal[
        "prompt_cache_hits",
        "prompt_cache_misses",
        "graph_captures",
        "graph_replays",
        "graph_eager_steps",
    ],
    str,
]


# ── API → worker ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop this job's rows before the next step.

    The worker answers with Dropped, whether it knows the job or not.
    """

    id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish nothing more and exit."""


# ── worker → API ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ready:
    """The weights are loaded, and every stage has run once.

    threads: torch's, on the CPU. compiled: whether compiled networks compute any of them.
    """

    device: str
    dtype: str
    threads: int = 1
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process ends by an error. lasting: whether another process would meet it again."""

    reason: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a job in each stage of the worker.

    queue: from its arrival in the worker to its first encode.
    """

    queue: float = 0.0
    encode: float = 0.0
    prior: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Image:
    """One row's image. pixels: height × width × 3 bytes of RGB, or × 4 of RGBA in an answer."""

    index: int
    width: int
    height: int
    pixels: bytes | memoryview

    @classmethod
    def of(cls, array: Pixels, index: int) -> Image:
        """Return uint8 [H, W, 3], or [H, W, 4] with alpha, as an image."""
        return cls(index, array.shape[1], array.shape[0], np.ascontiguousarray(array).tobytes())

    @property
    def array(self) -> Pixels:
        """The pixels as uint8 [H, W, 3], or [H, W, 4] with alpha; not to be written to."""
        return np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, -1)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return Image, (self.index, self.width, self.height, out_of_band(self.pixels, protocol))


@dataclass(frozen=True, slots=True)
class Preview:
    """An unfinished image, as the denoiser predicts it after so many of its steps.

    number: its place in `preview_steps`. It may be smaller than the answer's, before its image is
    enlarged.
    """

    id: str
    number: int
    step: int
    image: Image


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image of an `early` job. truncated: as in `Finished`."""

    id: str
    image: Image
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole job. truncated: the encoders that could not take a whole prompt ("byt5", "clip").

    step_seconds: of a traced job, the end of each step that it took part in, in seconds from its
    first encode.
    """

    id: str
    images: tuple[Image, ...]
    timings: Timings
    truncated: tuple[str, ...] = ()
    step_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that cannot be done. retryable: whether another attempt could succeed."""

    id: str
    code: FailureCode
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Dropped:
    """No row of this job is stepped any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Running:
    """The jobs of the stage that begins now, sent only when they change.

    Should the worker die next, these jobs are the suspects.
    """

    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A finished denoiser step.

    branches: of all its rows. pixels: width times height of each row. model: the bundle's name.
    denoiser: the network's.
    """

    rows: int
    branches: int
    pixels: int
    seconds: float
    model: str = ""
    denoiser: str = DENOISER


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """A worker process's share of the machine.

    threads: those that compute its steps now. device_bytes: of its GPU's memory, by kind; empty
    without a GPU.
    """

    resident_bytes: int
    cpu_seconds: float
    threads: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The worker's state. steps, counts: since the last heartbeat; the others: now.

    cache_bytes: held by the prompt cache. left: of every started job, the steps that all of its
    rows have yet to take.
    """

    steps: tuple[Step, ...]
    rows_running: int
    rows_waiting: int
    counts: Mapping[Count, int] = field(default_factory=dict)
    cache_bytes: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    stats: ProcessStats | None = None


@dataclass(frozen=True, slots=True)
class ShareCPU:
    """The number of workers that compute on this CPU from now on, the receiver among them."""

    workers: int


ToWorker = Job | Cancel | ShareCPU | Stop
FromWorker = Ready | Crashed | Preview | Drawn | Finished | Failed | Dropped | Running | Heartbeat


# ── the pipe ──────────────────────────────────────────────────────────────────────────────────────


def send_message(connection: Connection, message: object) -> None:
    """Send a message. Raises OSError if the other end is closed."""
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send((header, len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive_message(connection: Connection) -> Any:
    """Return the next message. Raises EOFError or OSError if the other end is closed."""
    header, count = connection.recv()
    return pickle.loads(header, buffers=[connection.recv_bytes() for _ in range(count)])
