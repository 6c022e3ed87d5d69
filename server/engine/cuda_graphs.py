"""Record steps, priors and decodes as CUDA graphs before the server is ready, and replay them.

A step is some hundred small kernels, and launching them one by one takes longer than running them.
A graph has fixed shapes, so rows are padded to the next recorded number and their conditions to the
next recorded length. Shapes that no graph fits are computed eagerly and counted.

Letters: B rows, N branches, H W token grid, L condition tokens, C channels, S widths of the time's
and the condition's parts.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model import sampling
from model.config import BundleConfig, BundleV3Config, Sampler
from model.networks.denoiser_v1 import ConditionV1, DenoiserV1
from model.networks.denoiser_v3 import Condition, Denoiser
from model.pipeline import Drawing, Eager, Imagine, Lanes, Pictures, Pipeline, PipelineV3
from model.rows import AnyCondition
from model.runtime import send
from server.engine.messages import Count
from server.engine.scheduler import LENGTHS

log = logging.getLogger(__name__)

_WARM_UPS = 2

Function = Callable[[], Tensor]


class Recording(Protocol):
    @property
    def output(self) -> Tensor: ...

    def replay(self) -> None: ...


class Recorder(Protocol):
    def __call__(self, function: Function) -> Recording: ...


def recorded(recorder: Recorder, function: Function, name: str, counters: Counter[Count], *, ready: bool = False) -> Recording | None:
    """A counted recording; None, and a line in the log, where there can be none: such shapes are computed eagerly. ready: the server is."""
    try:
        recording = recorder(function)
    except RuntimeError as error:  # what may not be recorded, or does not fit into the device's memory
        log.warning("not recorded, will be computed eagerly: %s: %s", name, error)
        return None
    counters["graph_captures", str(ready).lower()] += 1
    return recording


class CUDARecorder:
    """Records on one device, all its graphs in one memory pool: no two of them may run at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function) -> Recording:
        # Libraries set themselves up in their first call, which may not be recorded.
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            output = function()
        return _CUDARecording(graph, output)


@dataclass(frozen=True)
class _CUDARecording:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        self.graph.replay()


class Bucket(NamedTuple):
    """The shapes of one graph. branches: lanes of each row, 1 or 2; length: condition tokens of each lane, 1 for v1."""

    grid: tuple[int, int]
    rows: int
    branches: int
    length: int

    @property
    def lanes(self) -> int:
        return self.rows * self.branches

    @property
    def work(self) -> int:
        return self.lanes * math.prod(self.grid)


def row_counts(most: int) -> list[int]:
    """Powers of two, and the most."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def buckets(config: BundleConfig, max_rows: int, sizes: Iterable[tuple[int, int]]) -> list[Bucket]:
    """What a server records: these picture sizes (width, height), rows in powers of two, the scheduler's classes of condition lengths."""
    lengths = [1]
    if isinstance(config, BundleV3Config):
        # A class counts a text's bytes; CLIP's text and image follow them.
        longest, clip = config.byt5.max_bytes, 2 * config.denoiser.clip_seq_len
        lengths = sorted({min(length, longest) + clip for length in LENGTHS})
    return [Bucket(*shape) for shape in product(grids(config, sizes), row_counts(max_rows), (1, 2), lengths)]


def grids(config: BundleConfig, sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Picture sizes (width, height) → token grids (H, W)."""
    return [(height // config.vqgan.downscale, width // config.vqgan.downscale) for width, height in sizes]


class Memory:
    """The inputs of all steps, allocated once for the largest; graphs that never run at once can read the same memory."""

    def __init__(self, denoiser: Denoiser | DenoiserV1, buckets: Iterable[Bucket], device: torch.device) -> None:
        buckets = list(buckets)
        self.tokens = torch.zeros(max(b.rows * math.prod(b.grid) for b in buckets), dtype=torch.int64, device=device)
        self.times = denoiser.times(torch.ones(max(b.rows for b in buckets), device=device))
        self.share = torch.zeros(max(b.lanes for b in buckets), device=device)
        self.condition = _conditions(denoiser, max(b.lanes * b.length for b in buckets), self.times)

    def views(self, b: Bucket) -> tuple[Tensor, Tensor, Tensor, AnyCondition]:
        """(tokens, times, share, condition) in a bucket's shapes."""
        tokens = self.tokens[: b.rows * math.prod(b.grid)].view(b.rows, *b.grid)
        return tokens, self.times[: b.rows], self.share[: b.lanes], self.condition(b)


def _conditions(denoiser: Denoiser | DenoiserV1, most: int, like: Tensor) -> Callable[[Bucket], AnyCondition]:
    """Room for `most` condition tokens of all lanes together, seen in a bucket's shapes. like: of the type and device."""
    if isinstance(denoiser, DenoiserV1):
        levels = [like.new_zeros(most, 1, 1, width) for width in denoiser.modulation_widths]
        return lambda b: ConditionV1(tuple(level[: b.lanes] for level in levels))
    kv, mask = like.new_zeros(most, denoiser.condition_width), torch.ones(most, dtype=torch.bool, device=like.device)

    def view(b: Bucket) -> Condition:
        keys = b.lanes * b.length
        return Condition(kv[:keys].view(b.lanes, b.length, -1), mask[:keys].view(b.lanes, b.length))

    return view


@dataclass
class _Step:
    """One bucket's graph and the views of the static memory that it reads."""

    tokens: Tensor  # [B, H, W]
    times: Tensor  # [B, S]
    share: Tensor  # [N]
    condition: AnyCondition  # N rows, L long
    recording: Recording


@dataclass
class _Draw:
    """One sampler's graph at one number of rows, and what it reads."""

    features: Tensor  # [B, H, W, C]
    drawing: Drawing
    recording: Recording


class Graphs:
    """Stands in for `Eager` where shapes repeat. What differs by position, as regions do, is not recorded.

    recorder: how a function is recorded; a test brings one that needs no GPU. counters: where to count captures, replays and eager steps.
    """

    def __init__(self, pipeline: Pipeline, buckets: Iterable[Bucket], recorder: Recorder, counters: Counter[Count]) -> None:
        self.eager, self.denoiser, self.counters = Eager(pipeline.bundle), pipeline.bundle.denoiser, counters
        self._recorder, self._device, self._all_recorded = recorder, pipeline.device, False
        self._samplers = pipeline.config.samplers
        # The largest first: the others then find their memory in the pool.
        self._buckets = sorted(set(buckets), key=lambda b: (b.work, b.lanes * b.length), reverse=True)
        self._steps: dict[Bucket, _Step] = {}
        self._draws: dict[tuple[Sampler, int, tuple[int, int]], _Draw] = {}
        # Whose conditions lie in the static memory, for which bucket, and where in their shares each lane's is.
        self._loaded: tuple[Bucket, Lanes, Tensor] | None = None

    @torch.inference_mode()
    def record_all(self) -> None:
        """Records every bucket's step, and every sampler's draw for its rows."""
        memory = Memory(self.denoiser, self._buckets, self._device)
        for bucket in self._buckets:
            if step := self._record_step(bucket, memory):
                self._steps[bucket] = step
        examples = {(bucket.rows, bucket.grid): step.recording.output for bucket, step in self._steps.items()}
        for sampler, ((rows, grid), example) in product(self._samplers, examples.items()):
            if draw := self._record_draw(sampler, example):
                self._draws[sampler, rows, grid] = draw
        self._all_recorded = True

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def features(self, tokens: Tensor, times: Tensor, lanes: Lanes, share: Tensor) -> Tensor:
        """As `Executor.features`; the result lasts until the next call."""
        bucket = self._bucket(tokens, lanes) if share.dim() == 1 else None
        if bucket is None:
            self.counters["graph_eager_steps", ""] += 1
            return self.eager.features(tokens, times, lanes, share)
        step, B = self._steps[bucket], len(tokens)
        step.tokens[:B] = tokens
        step.times[:B] = times
        step.share.copy_(F.pad(share, (0, 1))[self._load(bucket, lanes)])
        self._replay(step.recording)
        return step.recording.output[:B]

    def _bucket(self, tokens: Tensor, lanes: Lanes) -> Bucket | None:
        """The least work that these rows fit into; found once for as long as the same conditions are read."""
        B, H, W = tokens.shape
        if self._loaded is not None and self._loaded[1] is lanes and self._loaded[0].grid == (H, W):
            return self._loaded[0]
        branches = max(sum(i == row for i, _ in lanes.members) for row in range(B))
        length = max(condition.length for _, condition in lanes.members)
        fitting = [b for b in self._steps if b.grid == (H, W) and b.rows >= B and b.branches >= branches and b.length >= length]
        return min(fitting, key=lambda b: (b.work, b.length), default=None)

    def _load(self, bucket: Bucket, lanes: Lanes) -> Tensor:
        """Brings the conditions to where the bucket's graph reads them, unless they are there; returns each lane's place among the shares.

        A lane without a branch counts nothing: it has the place behind the last one. It reads what its row's first lane reads, or, in a
        row that is not there, whatever lay there before.
        """
        if self._loaded is None or self._loaded[:2] != (bucket, lanes):
            places = [len(lanes.members)] * bucket.lanes
            target: Any = self._steps[bucket].condition  # of the same kind as the members
            used = dict.fromkeys(range(bucket.rows), 0)
            for place, (row, condition) in enumerate(lanes.members):
                lane = row * bucket.branches + used[row]
                places[lane] = place
                for own in range(lane, (row + 1) * bucket.branches):
                    target.put(own, condition)
                used[row] += 1
            self._loaded = bucket, lanes, send(places, self._device)
        return self._loaded[2]

    def _record_step(self, bucket: Bucket, memory: Memory) -> _Step | None:
        rows = bucket.rows
        denoiser: Any = self.denoiser  # which reads conditions of the kind that its memory has
        tokens, times, share, condition = memory.views(bucket)
        row_of = torch.arange(rows, device=self._device).repeat_interleave(bucket.branches)

        def guided() -> Tensor:
            return sampling.mix(denoiser.features(tokens, times, condition, row_of), row_of, share, rows)

        recording = self._record(guided, f"the step of {bucket}")
        return None if recording is None else _Step(tokens, times, share, condition, recording)

    # ── a draw ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def draw(self, sampler: Sampler, features: Tensor, drawing: Drawing) -> Tensor:
        """As `Executor.draw`; the result lasts until the next call."""
        B, H, W, _ = features.shape
        rows = min((n for family, n, grid in self._draws if family == sampler and grid == (H, W) and n >= B), default=None)
        if rows is None:
            return self.eager.draw(sampler, features, drawing)
        draw = self._draws[sampler, rows, (H, W)]
        draw.features[:B] = features
        for static, fresh in zip(draw.drawing, drawing, strict=True):
            static[:B] = fresh
        self._replay(draw.recording)
        return draw.recording.output[:B]

    def _record_draw(self, sampler: Sampler, example: Tensor) -> _Draw | None:
        features, rows = torch.zeros_like(example), len(example)
        drawing = Drawing(*(torch.full(shape, 0.5, device=self._device) for shape in (example.shape[:3], (rows,), (rows,))))
        recording = self._record(lambda: self.eager.draw(sampler, features, drawing), f"the draw of {rows} rows by {sampler}")
        return None if recording is None else _Draw(features, drawing, recording)

    # ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _record(self, function: Function, name: str) -> Recording | None:
        return recorded(self._recorder, function, name, self.counters, ready=self._all_recorded)

    def _replay(self, recording: Recording) -> None:
        recording.replay()
        self.counters["graph_replays", ""] += 1


@dataclass
class _Imagining:
    """One number of images' graph and what it reads."""

    text: Tensor  # [B, D]
    noise: Tensor  # [S + 1, B, D]
    recording: Recording


class PriorGraphs:
    """Stands in for a pipeline's `imagine`.

    recorder: one that shares no memory with the denoiser's graphs, beside which these are replayed. counters: as for `Graphs`.
    """

    def __init__(self, pipeline: PipelineV3, rows: Iterable[int], recorder: Recorder, counters: Counter[Count]) -> None:
        self.eager: Imagine = pipeline.imagine
        self.counters, self._recorder = counters, recorder
        self._shape, self._device, self._dtype = pipeline.prior_noise, pipeline.device, pipeline.dtype
        self._rows = sorted(set(rows), reverse=True)
        self._recorded: dict[int, _Imagining] = {}

    @torch.inference_mode()
    def record_all(self) -> None:
        for rows in self._rows:
            if made := self._record(rows):
                self._recorded[rows] = made

    def _record(self, rows: int) -> _Imagining | None:
        steps, width = self._shape
        text = torch.zeros(rows, width, dtype=self._dtype, device=self._device)
        noise = torch.zeros(steps, rows, width, device=self._device)
        recording = recorded(self._recorder, lambda: self.eager(text, noise), f"the prior of {rows} images", self.counters)
        return None if recording is None else _Imagining(text, noise, recording)

    @torch.inference_mode()
    def __call__(self, text: Tensor, noise: Tensor) -> Tensor:
        """As `Imagine`; more images than any graph has are computed eagerly."""
        B = len(text)
        rows = min((rows for rows in self._recorded if rows >= B), default=None)
        if rows is None:
            return self.eager(text, noise)
        graph = self._recorded[rows]
        graph.text[:B] = text
        graph.noise[:, :B] = noise
        graph.recording.replay()
        self.counters["graph_replays", ""] += 1
        return graph.recording.output[:B].clone()  # the next replay writes to the same place


class PictureGraphs:
    """Stands in for a pipeline's `pictures`.

    grids: (H, W) of the tokens. recorder: one that shares no memory with the denoiser's graphs, beside which these are replayed; it may be
    the prior's, which runs in the same stream. counters: as for `Graphs`.
    """

    def __init__(
        self, pipeline: Pipeline, grids: Iterable[tuple[int, int]], rows: Iterable[int], recorder: Recorder, counters: Counter[Count]
    ) -> None:
        self.eager: Pictures = pipeline.pictures
        self.counters, self._recorder, self._device = counters, recorder, pipeline.device
        # The largest first: the others then find their memory in the pool.
        self._shapes = sorted({(B, *grid) for grid, B in product(grids, rows)}, key=lambda shape: -torch.Size(shape).numel())
        self._recorded: dict[tuple[int, int, int], tuple[Tensor, Recording]] = {}

    @torch.inference_mode()
    def record_all(self) -> None:
        for shape in self._shapes:
            if made := self._record(shape):
                self._recorded[shape] = made

    def _record(self, shape: tuple[int, int, int]) -> tuple[Tensor, Recording] | None:
        tokens = torch.zeros(shape, dtype=torch.int64, device=self._device)
        recording = recorded(self._recorder, lambda: self.eager(tokens), f"the pictures of {shape} tokens", self.counters)
        return None if recording is None else (tokens, recording)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """As `Pictures`; other grids, and more pictures than any graph has, are computed eagerly."""
        B, H, W = tokens.shape
        shape = min((shape for shape in self._recorded if shape[0] >= B and shape[1:] == (H, W)), default=None)
        if shape is None:
            return self.eager(tokens)
        static, recording = self._recorded[shape]
        static[:B] = tokens
        recording.replay()
        self.counters["graph_replays", ""] += 1
        return recording.output[:B].clone()  # the next replay writes to the same place
