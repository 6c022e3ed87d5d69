"""Hold the worker's tensors: start rows (encode, prior, condition), step them, decode them.

On CUDA, starting and decoding run in a stream beside the steps. The scheduler gives each
deterministic row a pool of its own, so that it always meets the same shapes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.batch_encoder import group_by
from model.config import SamplingConfig
from model.pipeline import Pipeline
from model.row_builder import RowBuilder
from model.rows import Row
from model.runtime import pick_device, pick_dtype, use
from server.engine.cpu_threads import SharedThreads
from server.engine.cuda_graphs import CUDARecorder, Recorder, use_cuda_graphs
from server.engine.cuda_streams import Mark, Streams
from server.engine.graph_shapes import GraphShapes
from server.engine.job import Job
from server.engine.loading import load_pipeline
from server.engine.messages import Count, Image
from server.engine.prompt_cache import PromptCache, entry_bytes, tensors_in
from server.engine.scheduler import LENGTHS, RowId
from server.settings import Settings

# Rows decoded at once: no step waits for more than one decode of this many.
DECODE_ROWS = 4
# The time that the largest batch may take at start, about.
WARM_UP_S = 5.0


@dataclass
class Stopwatch:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure a stage."""
        began = time.perf_counter()
        yield
        self.count(stage, time.perf_counter() - began)

    def add(self, other: Stopwatch) -> None:
        """Add another stopwatch's seconds."""
        for stage, seconds in other.seconds.items():
            self.count(stage, seconds)

    def count(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True, slots=True)
class Decoding:
    """Images [B, height, width, 3] that are complete when their mark is passed.

    rows: of each image. steps: that each row has taken.
    """

    rows: tuple[RowId, ...]
    steps: tuple[int, ...]
    pixels: Tensor
    mark: Mark

    def images(self) -> list[Image]:
        """Wait for the images and return them."""
        self.mark.wait()
        _, height, width, _ = self.pixels.shape
        pixels = [memoryview(image.numpy()).cast("B") for image in self.pixels]
        return [
            Image(row.index, width, height, content)
            for row, content in zip(self.rows, pixels, strict=True)
        ]


class Runner:
    """The loaded bundles, and the rows that are being denoised.

    counters: totals since the start.
    """

    def __init__(self, settings: Settings, pipelines: Iterable[Pipeline] | None = None) -> None:
        """Load the bundles of the settings, unless `pipelines` holds them already."""
        device = use(pick_device(settings.device))
        self.dtype = pick_dtype(settings.dtype, device)
        self.device = device
        if pipelines is None:
            pipelines = [load_pipeline(name, settings) for name in settings.bundles]
        self.pipelines = {pipeline.config.name: pipeline for pipeline in pipelines}
        self._settings, self.streams = settings, Streams(device)
        self.threads = SharedThreads(1, torch.set_num_threads)
        self.counters: Counter[Count] = Counter()
        self.cache = PromptCache(settings.prompt_cache_bytes, entry_bytes, self.counters)
        self._builders = {
            name: RowBuilder(pipeline, self.cache) for name, pipeline in self.pipelines.items()
        }
        self.rows: dict[RowId, Row] = {}
        self._starting: dict[RowId, Mark] = {}

    def choose_threads(self) -> None:
        """Tune a CPU's number of threads from now on, unless the settings fix it."""
        if self.device.type == "cpu" and not self._settings.threads:
            self.threads = SharedThreads(torch.get_num_threads(), torch.set_num_threads)

    def start(
        self, parts: Sequence[tuple[Job, Sequence[int]]], watch: Stopwatch
    ) -> list[tuple[str, ...]]:
        """Build these rows of these jobs, by their numbers.

        Returns, for each job, the encoders that cut one of its prompts.
        """
        images = [(job, index) for job, indices in parts for index in indices]
        with (
            self._steady(any(job.sampling.deterministic for job, _ in parts)),
            self.streams.beside(),
        ):
            rows: dict[RowId, Row] = {}
            for group in group_by(images, lambda image: image[0].model):
                builder = self._builders[group[0][0].model]
                built = builder.build([job.image(index) for job, index in group], watch)
                rows.update(zip((RowId(job.id, index) for job, index in group), built, strict=True))
            self._starting.update(dict.fromkeys(rows, self.streams.mark()))
        self.rows.update(rows)
        return [rows[RowId(job.id, indices[0])].truncated for job, indices in parts]

    def started(self, rows: Sequence[RowId]) -> list[RowId]:
        """Return the rows that can be stepped without a wait.

        If there is none, wait, and return all.
        """
        ready = [row for row in rows if row not in self._starting or self._starting[row].passed]
        ready = ready or list(rows)
        for row in ready:
            if mark := self._starting.pop(row, None):
                mark.wait()
                self.streams.hand_over(tensors_in(self.rows[row]))
        return ready

    def step(self, model: str, rows: Sequence[RowId]) -> None:
        """Take one denoiser step for started rows of one pool."""
        stepped = [self.rows[row] for row in rows]
        first = stepped[0]
        kind = (model, first.sampling.denoiser, len(rows), self.branches(rows), first.tokens.shape)
        with self.threads.all() if first.sampling.deterministic else self.threads.step(kind):
            self.pipelines[model].advance(stepped)
        self.streams.stepped()

    def steps_done(self, row: RowId) -> int:
        """Return the number of steps that a row has taken, skipped ones included."""
        return self.rows[row].step

    def done(self, row: RowId) -> bool:
        """Return whether a row has taken all of its steps."""
        return self.rows[row].done

    def branches(self, rows: Sequence[RowId]) -> int:
        """Return the number of branches of these rows' next step."""
        return sum(len(self.rows[row].branches) for row in rows)

    def decode(self, model: str, rows: Sequence[RowId]) -> Decoding:
        """Begin to decode these rows of one pool, finished or not, as far as they have come."""
        tokens = [self.rows[row].clean for row in rows]
        deterministic = any(self.rows[row].sampling.deterministic for row in rows)
        # The stacking is inside too: the tokens of a row that was done as it began were made beside
        # the steps.
        with self._steady(deterministic), self.streams.beside(reading=tokens):
            pixels = self.streams.to_host(self.pipelines[model].decode_tokens(torch.stack(tokens)))
            return Decoding(
                tuple(rows), tuple(map(self.steps_done, rows)), pixels, self.streams.mark()
            )

    def _steady(self, deterministic: bool) -> AbstractContextManager[None]:
        """Compute with all threads if deterministic: roundings must not depend on the tuning."""
        return self.threads.all() if deterministic else nullcontext()

    def drop(self, rows: Sequence[RowId]) -> None:
        """Forget rows, known or not."""
        for row in rows:
            self.rows.pop(row, None)
            self._starting.pop(row, None)

    # ── before the first request ──────────────────────────────────────────────────────────────────

    def warm_up(self) -> None:
        """Run every stage of every bundle and capture its graphs, so that no request has to.

        That is every preset once, and every denoiser with the largest batch.
        """
        for pipeline in self.pipelines.values():
            largest: dict[str, tuple[SamplingConfig, float]] = {}
            for preset in pipeline.config.preset_names:
                began, sampling = time.perf_counter(), pipeline.config.sampling(preset, steps=2)
                pipeline.generate(["warm"], [0], sampling)
                seconds = time.perf_counter() - began
                largest.setdefault(sampling.denoiser, (sampling, seconds))
            for sampling, seconds in largest.values():
                self._warm_up_batch(pipeline, sampling, seconds)
            if self.device.type == "cuda" and self._settings.cuda_graphs:
                self.capture_graphs(pipeline, lambda: CUDARecorder(self.device))

    def _warm_up_batch(self, pipeline: Pipeline, sampling: SamplingConfig, seconds: float) -> None:
        """Generate the largest batch, of the longest prompts; fewer rows on a slow device.

        Allocators keep the most memory that was ever needed: needed now, it is no growth later.
        seconds: that one row takes.
        """
        rows = max(1, min(self._settings.max_batch_rows, int(WARM_UP_S / seconds)))
        pipeline.generate(["warm " * LENGTHS[-1]] * rows, range(rows), sampling)

    def capture_graphs(self, pipeline: Pipeline, new_recorder: Callable[[], Recorder]) -> None:
        """Replay the pipeline's computations from now on, at its native and the settings' sizes."""
        sizes = dict.fromkeys([pipeline.config.native_size, *self._settings.captured_sizes])
        step = pipeline.config.size_step
        fitting = [(width, height) for width, height in sizes if width % step == height % step == 0]
        shapes = GraphShapes.for_server(
            pipeline.config, fitting, self._settings.max_batch_rows, DECODE_ROWS
        )
        use_cuda_graphs(pipeline, shapes, new_recorder, self.counters)
