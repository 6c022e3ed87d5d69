"""Define the messages between the API process and its workers, and send them over a pipe.

Messages are plain frozen dataclasses, no torch. A message crosses the pipe as a small pickle,
followed by the pixels as they lie in memory. Shared memory is not used: a segment outlives a worker
that is killed before it names the segment, and page faults of a new one cost more than the pipe's
copies. A message is received as a whole or, if its sender dies while sending it, not at all.

`deadline` and every other time point is `time.monotonic()`, one clock for all processes of a
machine.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal, SupportsIndex

from model.config import Interpolation, SamplingConfig
from model.image_request import (
    Edit,
    ImageRequest,
    Keyframe,
    Reference,
    Region,
    Repaint,
    conditional_prompts,
    out_of_band,
    steps_skipped,
)

Priority = Literal["interactive", "batch"]
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
class Job:
    """One request: as many rows as seeds, all of one size.

    width, height: pixels, multiples of the bundle's size step. arrived_at: the request's arrival,
    the order in which jobs are served. alone: its rows share no step with another job's, because it
    is suspected of having crashed a worker. previews: how many of each
    image, at most, are sent before it is done. early: each image is sent as soon as it is done, and
    all of them again with the answer. traceparent: the W3C trace context of a traced request, whose
    answer has `step_seconds`; otherwise empty. held_bytes: size of the client's files that the API
    process keeps until the images are done.

    The other fields are those of `model.image_request.ImageRequest`. With keyframes the rows are
    frames, evenly spaced from the first keyframe to the last.
    """

    id: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    deadline: float
    arrived_at: float = 0.0
    priority: Priority = "interactive"
    alone: bool = False
    previews: int = 0
    early: bool = False
    traceparent: str = ""
    canvas: Repaint | Edit | None = None
    references: tuple[Reference, ...] = ()
    keyframes: tuple[Keyframe, ...] = ()
    mode: Interpolation = "slerp"
    regions: tuple[Region, ...] = ()
    cache_scope: str = ""
    held_bytes: int = 0

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text that a conditional branch reads."""
        return conditional_prompts(self.prompt, self.keyframes, self.regions)

    @property
    def image_bytes(self) -> int:
        """Bytes of the client's images, masks and weights, decoded, and of files that are kept."""
        canvas = () if self.canvas is None else (self.canvas.picture,)
        masks = (self.canvas.mask,) if isinstance(self.canvas, Repaint) else ()
        seen = (reference.picture for reference in self.references)
        shown = (keyframe.picture for keyframe in self.keyframes if keyframe.picture)
        weights = (region.weight for region in self.regions)
        images = (*canvas, *masks, *seen, *shown, *weights)
        return self.held_bytes + sum(len(image.content) for image in images)

    def image(self, index: int) -> ImageRequest:
        """Return everything that decides what image `index` looks like."""
        return ImageRequest(
            prompt=self.prompt,
            seed=self.seeds[index],
            width=self.width,
            height=self.height,
            sampling=self.sampling,
            negative_prompt=self.negative_prompt,
            canvas=self.canvas,
            references=self.references,
            keyframes=self.keyframes,
            position=self.position(index) if self.keyframes else 0.0,
            mode=self.mode,
            regions=self.regions,
            cache_scope=self.cache_scope,
        )

    def position(self, index: int) -> float:
        """Return a frame's place among the keyframes; 1.5 is half way from second to third."""
        return index * (len(self.keyframes) - 1) / max(1, len(self.seeds) - 1)

    @property
    def steps_skipped(self) -> int:
        """Steps of the schedule before each row's first: an edit joins where as much is noise."""
        steps = self.sampling.steps
        return steps_skipped(self.canvas.strength, steps) if isinstance(self.canvas, Edit) else 0

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """The step of each preview: evenly spaced, none at the start or the end.

        Fewer than asked for if steps are few.
        """
        taken = self.sampling.steps - self.steps_skipped
        due = {(i + 1) * taken // (self.previews + 1) for i in range(self.previews)}
        return tuple(self.steps_skipped + steps for steps in sorted(due - {0}))

    @property
    def branches(self) -> float:
        """Branches of one of its rows, averaged over its steps."""
        guided = self.sampling.guidance_steps / self.sampling.steps if self.sampling.guided else 0.0
        return 1 + len(self.regions) + guided


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
    """The weights are loaded, and every stage has run once."""

    device: str
    dtype: str


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

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return Image, (self.index, self.width, self.height, out_of_band(self.pixels, protocol))


@dataclass(frozen=True, slots=True)
class Preview:
    """An unfinished image, as the denoiser predicts it at this step of the schedule.

    number: its place in `preview_steps`.
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
    """

    rows: int
    branches: int
    pixels: int
    seconds: float
    model: str = ""


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


ToWorker = Job | Cancel | Stop
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
