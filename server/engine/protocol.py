"""The words the API process and its workers say to each other. Plain frozen dataclasses over a pipe; no torch, pixels as bytes.

`deadline` and every other time point is `time.monotonic()`, one clock for all processes of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.config import SamplingConfig

Priority = Literal["interactive", "batch"]


# ── API → worker ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Job:
    """One request: as many rows as seeds, all of one size and one condition.

    width, height: pixels, multiples of the bundle's size step. alone: its rows share no step with another job's, because it may have
    killed a worker.
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
    """One finished row. pixels: height × width × 3 bytes of RGB."""

    index: int
    width: int
    height: int
    pixels: bytes


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
    code: Literal["deadline", "internal", "out_of_memory"]
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
    """A denoiser step that was done. pixels: width times height of each of its rows."""

    rows: int
    pixels: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Beat:
    """Says that the worker lives, with the steps it did since the last beat, and its rows now."""

    steps: tuple[Step, ...]
    rows_running: int
    rows_waiting: int


ToWorker = Job | Cancel | Stop
FromWorker = Ready | Finished | Failed | Dropped | Running | Beat
