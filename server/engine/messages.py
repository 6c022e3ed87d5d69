"""Define the messages between the API process and its workers, and send them over a pipe.

Messages are plain frozen dataclasses, no torch. A message crosses the pipe as a small pickle,
followed by the pixels as they lie in memory. Shared memory is not used: a segment outlives a worker
that is killed before it names the segment, and page faults of a new one cost more than the pipe's
copies. A message of a worker that dies while sending it is not received.

`deadline` and every other time point is `time.monotonic()`, one clock for all processes of a machine.
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

# What a worker counts, by the name of the figure and the value of its label, "" where it has none.
Count = tuple[
    Literal["prompt_cache_hits", "prompt_cache_misses", "graph_captures", "graph_replays", "graph_eager_steps"],
    str,
]


# ── API → worker ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Job:
    """One request: as many rows as seeds, all of one size.

    width, height: pixels, multiples of the bundle's size step. alone: its rows share no step with another job's, because it may have
    killed a worker. previews: how many of each image, at most, are sent before it is done. early: each image is sent as soon as it is
    done, and all of them again with the answer.

    canvas: what its rows begin from, nothing but noise if absent. references: their mixed CLIP embedding stands in for the prior's.
    keyframes: if any, the rows are frames, evenly spaced from the first to the last; mode: on which path between two of them.
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
    priority: Priority = "interactive"
    alone: bool = False
    previews: int = 0
    early: bool = False
    canvas: Repaint | Edit | None = None
    references: tuple[Reference, ...] = ()
    keyframes: tuple[Keyframe, ...] = ()
    mode: Interpolation = "slerp"
    regions: tuple[Region, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text that a conditional branch reads."""
        return conditional_prompts(self.prompt, self.keyframes, self.regions)

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
        )

    def position(self, index: int) -> float:
        """Where among the keyframes a frame lies: 1.5 is half way between the second and the third."""
        return index * (len(self.keyframes) - 1) / max(1, len(self.seeds) - 1)

    @property
    def steps_skipped(self) -> int:
        """How many steps of the schedule lie behind each row when it begins: an edit joins where as much is noise as it asks for."""
        steps = self.sampling.steps
        return steps_skipped(self.canvas.strength, steps) if isinstance(self.canvas, Edit) else 0

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """At which step each preview is due: evenly spaced, none at the start or the end, fewer than asked if steps are few."""
        taken = self.sampling.steps - self.steps_skipped
        due = {(i + 1) * taken // (self.previews + 1) for i in range(self.previews)}
        return tuple(self.steps_skipped + steps for steps in sorted(due - {0}))

    @property
    def branches(self) -> float:
        """How many lanes of a step one of its rows takes, on average over its steps."""
        guided = self.sampling.guidance_steps / self.sampling.steps if self.sampling.guided else 0.0
        return 1 + len(self.regions) + guided


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop this job's rows before the next step; answered by Dropped, whether the job is known or not."""

    id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish nothing more and exit."""


# ── worker → API ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ready:
    """Weights loaded and every stage run once."""

    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a job spent in each stage of the worker; `queue` is from arrival in the worker to its first encode."""

    queue: float = 0.0
    encode: float = 0.0
    prior: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Image:
    """One row's picture. pixels: height × width × 3 bytes of RGB."""

    index: int
    width: int
    height: int
    pixels: bytes | memoryview

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return Image, (self.index, self.width, self.height, out_of_band(self.pixels, protocol))


@dataclass(frozen=True, slots=True)
class Preview:
    """What an unfinished image would be as far as its denoiser sees at this step of the schedule. number: which of `preview_steps`."""

    id: str
    number: int
    step: int
    image: Image


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image of a job that wants them early. truncated: as `Finished` has it."""

    id: str
    image: Image
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole job. truncated: names of the encoders that could not take the whole prompt ("byt5", "clip")."""

    id: str
    images: tuple[Image, ...]
    timings: Timings
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that cannot be done. repeating: whether trying again could help."""

    id: str
    code: FailureCode
    message: str
    repeating: bool


@dataclass(frozen=True, slots=True)
class Dropped:
    """No row of this job is stepped any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Running:
    """The jobs with rows in the stage that begins now, sent only when they change: should the worker die next, one of them did it."""

    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A denoiser step that was done. branches: lanes of all its rows. pixels: width times height of each of its rows."""

    rows: int
    branches: int
    pixels: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker's process has of the machine.

    threads: those that compute its steps just now. device_bytes: of its GPU's memory, by kind; empty without one.
    """

    resident_bytes: int
    cpu_seconds: float
    threads: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beat:
    """Says that the worker lives. steps, counts: since the last beat; the others: now.

    cache_bytes: what the prompt cache holds. left: of every job that has begun, the steps that all of its rows have yet to take.
    """

    steps: tuple[Step, ...]
    rows_running: int
    rows_waiting: int
    counts: Mapping[Count, int] = field(default_factory=dict)
    cache_bytes: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    usage: Usage | None = None


ToWorker = Job | Cancel | Stop
FromWorker = Ready | Preview | Drawn | Finished | Failed | Dropped | Running | Beat


def send(connection: Connection, message: object) -> None:
    """Raises OSError if nobody reads any more."""
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send((header, len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    """The next message, once all of it is there. Raises EOFError or OSError if the other end is gone."""
    header, count = connection.recv()
    return pickle.loads(header, buffers=[connection.recv_bytes() for _ in range(count)])
