"""Capture steps, priors and decodes as CUDA graphs before the server is ready, and replay them.

    use_cuda_graphs(pipeline, GraphShapes.for_server(...), lambda: CUDARecorder(device), counters)

A step is some hundred small kernels, and launching them one by one takes longer than running them.
A graph has fixed shapes, so rows are padded to the next captured number and their conditions to the
next captured length. Shapes that no graph fits are computed eagerly and counted.

Letters: B rows, N branches, H W token grid, L condition tokens, C channels, S widths of the time's
and the condition's parts, D width of the prior's embeddings.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model import sampling
from model.config import DENOISER, PriorSettings, Sampler
from model.executor import BranchBatch, Eager, SamplingInputs
from model.networks.denoiser_v1 import ConditionV1, DenoiserV1
from model.networks.denoiser_v3 import Condition, Denoiser
from model.networks.layers import to_device
from model.pipeline import DecodeFn, Pipeline, PipelineV3, PriorFn
from model.rows import AnyCondition
from server.engine.graph_shapes import Bucket, GraphShapes
from server.engine.messages import Count

log = logging.getLogger(__name__)

_WARM_UPS = 2

Function = Callable[[], Tensor]


# ── capture ───────────────────────────────────────────────────────────────────────────────────────


class Recording(Protocol):
    """A captured function: a replay runs it again on its inputs' present values."""

    @property
    def output(self) -> Tensor:
        """The result of the latest replay, always in the same place."""

    def replay(self) -> None:
        """Run the function again."""


class Recorder(Protocol):
    """Captures a function of tensors in fixed places. A test brings one that needs no GPU."""

    def __call__(self, function: Function) -> Recording:
        """Run a function and capture it. Raises RuntimeError if it cannot be captured."""


def use_cuda_graphs(
    pipeline: Pipeline,
    shapes: GraphShapes,
    new_recorder: Callable[[], Recorder],
    counters: Counter[Count],
) -> None:
    """Capture a pipeline's steps, decodes and priors of these shapes; it replays them from now on.

    new_recorder: called twice, for the memory pool of all denoisers' steps, and for the one of
    decodes and priors, which run in one stream beside the steps. counters: of captures, replays and
    eager steps.
    """
    recorder = new_recorder()
    executors = {
        network: StepGraphs(pipeline, buckets, recorder, counters, network)
        for network, buckets in {DENOISER: shapes.buckets, **shapes.further}.items()
    }
    for steps in executors.values():
        steps.capture_all()
    beside = new_recorder()
    decodes = DecodeGraphs(pipeline, shapes.grids, shapes.decode_rows, beside, counters)
    decodes.capture_all()
    pipeline.executors.update(executors)
    pipeline.decode_tokens = decodes
    if isinstance(pipeline, PipelineV3):
        priors = PriorGraphs(pipeline, shapes.prior_rows, beside, counters)
        priors.capture_all()
        pipeline.run_prior = priors


def capture(
    recorder: Recorder,
    function: Function,
    name: str,
    counters: Counter[Count],
    *,
    ready: bool = False,
) -> Recording | None:
    """Return a counted recording; None, and a line in the log, where capture fails.

    ready: whether the server is, for the count.
    """
    try:
        recording = recorder(function)
    except RuntimeError as error:
        # It may not be captured, or does not fit into the device's memory.
        log.warning("graph not captured", extra={"fields": {"graph": name, "reason": str(error)}})
        return None
    counters["graph_captures", str(ready).lower()] += 1
    return recording


class CUDARecorder:
    """Capture on one device, all graphs in one memory pool: no two of them may run at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function) -> Recording:
        """Run a function and capture it. Raises RuntimeError if it cannot be captured."""
        # Libraries set themselves up in their first call, which may not be captured.
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
        """Launch the graph."""
        self.graph.replay()


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────


class _StaticInputs:
    """The inputs of all steps, allocated once for the largest step.

    Graphs share them, because no two run at once.
    """

    def __init__(
        self, denoiser: Denoiser | DenoiserV1, buckets: Sequence[Bucket], device: torch.device
    ) -> None:
        most_tokens = max(b.rows * math.prod(b.grid) for b in buckets)
        most_branches = max(b.branches for b in buckets)
        self.tokens = torch.zeros(most_tokens, dtype=torch.int64, device=device)
        self.times = denoiser.times(torch.ones(max(b.rows for b in buckets), device=device))
        self.weights = torch.zeros(most_branches, device=device)
        self.condition = _condition_views(
            denoiser, max(b.branches * b.length for b in buckets), self.times
        )

    def views(self, b: Bucket) -> tuple[Tensor, Tensor, Tensor, AnyCondition]:
        """Return (tokens, times, weights, condition) in a bucket's shapes."""
        tokens = self.tokens[: b.rows * math.prod(b.grid)].view(b.rows, *b.grid)
        return tokens, self.times[: b.rows], self.weights[: b.branches], self.condition(b)


def _condition_views(
    denoiser: Denoiser | DenoiserV1, most: int, like: Tensor
) -> Callable[[Bucket], AnyCondition]:
    """Allocate `most` condition tokens of all branches together.

    Returns their view of a bucket's shapes. like: a tensor of the type and device.
    """
    if isinstance(denoiser, DenoiserV1):
        levels = [like.new_zeros(most, 1, 1, width) for width in denoiser.modulation_widths]
        return lambda b: ConditionV1(tuple(level[: b.branches] for level in levels))
    kv = like.new_zeros(most, denoiser.condition_width)
    mask = torch.ones(most, dtype=torch.bool, device=like.device)

    def view(b: Bucket) -> Condition:
        keys = b.branches * b.length
        return Condition(
            kv[:keys].view(b.branches, b.length, -1), mask[:keys].view(b.branches, b.length)
        )

    return view


@dataclass
class _Step:
    """One bucket's graph, and the views of the static inputs that it reads."""

    tokens: Tensor  # [B, H, W]
    times: Tensor  # [B, S]
    weights: Tensor  # [N]
    condition: AnyCondition  # N branches, L long
    recording: Recording


@dataclass
class _Draw:
    """One sampler's graph at one number of rows, and what it reads."""

    features: Tensor  # [B, H, W, C]
    inputs: SamplingInputs
    recording: Recording


class StepGraphs:
    """Replace `Eager` where shapes repeat.

    Weights that differ by position, as those of regions do, are not captured. network: the
    denoiser's name.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        buckets: Iterable[Bucket],
        recorder: Recorder,
        counters: Counter[Count],
        network: str = DENOISER,
    ) -> None:
        self.eager, self.denoiser = Eager(pipeline.bundle, network), pipeline.denoisers[network]
        self._network = network
        self.counters, self._recorder = counters, recorder
        self._device, self._ready = pipeline.device, False
        self._samplers = pipeline.config.samplers
        # The largest first: the others then find their memory in the pool.
        self._buckets = sorted(
            set(buckets), key=lambda b: (b.work, b.branches * b.length), reverse=True
        )
        self._steps: dict[Bucket, _Step] = {}
        self._draws: dict[tuple[Sampler, int, tuple[int, int]], _Draw] = {}
        # Whose conditions lie in the static inputs, for which bucket, and where each branch's
        # weight is.
        self._loaded: tuple[Bucket, BranchBatch, Tensor] | None = None

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture every bucket's step, and every sampler's draw for its rows."""
        inputs = _StaticInputs(self.denoiser, self._buckets, self._device)
        for bucket in self._buckets:
            if step := self._capture_step(bucket, inputs):
                self._steps[bucket] = step
        examples = {
            (bucket.rows, bucket.grid): step.recording.output
            for bucket, step in self._steps.items()
        }
        for sampler, ((rows, grid), example) in product(self._samplers, examples.items()):
            if draw := self._capture_draw(sampler, example):
                self._draws[sampler, rows, grid] = draw
        self._ready = True

    def _capture_step(self, bucket: Bucket, inputs: _StaticInputs) -> _Step | None:
        rows = bucket.rows
        denoiser: Any = self.denoiser  # which reads conditions of the kind that its inputs have
        tokens, times, weights, condition = inputs.views(bucket)
        row_of = torch.arange(rows, device=self._device).repeat_interleave(bucket.branches_per_row)

        def guided() -> Tensor:
            features = denoiser.features(tokens, times, condition, row_of)
            return sampling.mix_branches(features, row_of, weights, rows)

        recording = self._capture(guided, f"the step of {self._network}, {bucket}")
        return None if recording is None else _Step(tokens, times, weights, condition, recording)

    def _capture_draw(self, sampler: Sampler, example: Tensor) -> _Draw | None:
        features, rows = torch.zeros_like(example), len(example)
        shapes = example.shape[:3], (rows,), (rows,)
        inputs = SamplingInputs(*(torch.full(shape, 0.5, device=self._device) for shape in shapes))
        name = f"the draw of {rows} rows of {self._network} by {sampler}"
        recording = self._capture(lambda: self.eager.sample(sampler, features, inputs), name)
        return None if recording is None else _Draw(features, inputs, recording)

    def _capture(self, function: Function, name: str) -> Recording | None:
        return capture(self._recorder, function, name, self.counters, ready=self._ready)

    def features(
        self, tokens: Tensor, times: Tensor, branches: BranchBatch, weights: Tensor
    ) -> Tensor:
        """Compute as `Executor.features`; the result lasts until the next call."""
        bucket = self._bucket(tokens, branches) if weights.dim() == 1 else None
        if bucket is None:
            self.counters["graph_eager_steps", ""] += 1
            return self.eager.features(tokens, times, branches, weights)
        step, B = self._steps[bucket], len(tokens)
        step.tokens[:B] = tokens
        step.times[:B] = times
        step.weights.copy_(F.pad(weights, (0, 1))[self._load(bucket, branches)])
        self._replay(step.recording)
        return step.recording.output[:B]

    def _bucket(self, tokens: Tensor, branches: BranchBatch) -> Bucket | None:
        """Return the bucket of the least work that the rows fit into.

        It is searched once for as long as the same conditions are read.
        """
        B, H, W = tokens.shape
        if (
            self._loaded is not None
            and self._loaded[1] is branches
            and self._loaded[0].grid == (H, W)
        ):
            return self._loaded[0]
        per_row = Counter(row for row, _ in branches.members)
        most = max(per_row.values())
        length = max(condition.length for _, condition in branches.members)
        fitting = [
            b
            for b in self._steps
            if b.grid == (H, W)
            and b.rows >= B
            and b.branches_per_row >= most
            and b.length >= length
        ]
        return min(fitting, key=lambda b: (b.work, b.length), default=None)

    def _load(self, bucket: Bucket, branches: BranchBatch) -> Tensor:
        """Copy the conditions to the bucket's inputs, unless they are there.

        Returns the place of each among the weights.

        A place without a branch counts nothing: its weight is the zero behind the last one. It
        reads the condition of its row's first branch or, in a row that does not exist, the previous
        content.
        """
        if self._loaded is None or self._loaded[:2] != (bucket, branches):
            places = [len(branches.members)] * bucket.branches
            target: Any = self._steps[bucket].condition  # of the same kind as the members
            used = dict.fromkeys(range(bucket.rows), 0)
            for place, (row, condition) in enumerate(branches.members):
                first = row * bucket.branches_per_row + used[row]
                places[first] = place
                for branch in range(first, (row + 1) * bucket.branches_per_row):
                    target.put(branch, condition)
                used[row] += 1
            self._loaded = bucket, branches, to_device(places, self._device)
        return self._loaded[2]

    def sample(self, sampler: Sampler, features: Tensor, inputs: SamplingInputs) -> Tensor:
        """Compute as `Executor.sample`; the result lasts until the next call."""
        B, H, W, _ = features.shape
        captured = (
            n for name, n, grid in self._draws if name == sampler and grid == (H, W) and n >= B
        )
        rows = min(captured, default=None)
        if rows is None:
            return self.eager.sample(sampler, features, inputs)
        draw = self._draws[sampler, rows, (H, W)]
        draw.features[:B] = features
        for static, fresh in zip(draw.inputs, inputs, strict=True):
            static[:B] = fresh
        self._replay(draw.recording)
        return draw.recording.output[:B]

    def log_probability(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Compute as `Executor.log_probability`; a few launches, which no graph holds."""
        return self.eager.log_probability(features, tokens)

    def _replay(self, recording: Recording) -> None:
        recording.replay()
        self.counters["graph_replays", ""] += 1


# ── the prior and the decoder ─────────────────────────────────────────────────────────────────────


@dataclass
class _PriorRun:
    """One number of images' graph, and what it reads."""

    text: Tensor  # [B, D]
    noise: Tensor  # [S + 1, B, D]
    recording: Recording


class PriorGraphs:
    """Replace a pipeline's `run_prior`: all of its steps are one graph for each number of images.

    Presets whose priors have other settings have graphs of their own.

    Sixty steps of forty-eight small blocks are more than ten thousand launches. They would keep the
    worker from stepping rows for longer than the device takes to compute them.

    recorder: one that shares no memory with the steps' graphs, beside which these are replayed.
    """

    def __init__(
        self,
        pipeline: PipelineV3,
        rows: Iterable[int],
        recorder: Recorder,
        counters: Counter[Count],
    ) -> None:
        self.eager: PriorFn = pipeline.run_prior
        self.counters, self._recorder = counters, recorder
        config = pipeline.config
        self._shapes = {each: pipeline.prior_noise(each) for each in config.prior_settings}
        self._device, self._dtype = pipeline.device, pipeline.dtype
        self._rows = sorted(set(rows), reverse=True)
        self._captured: dict[tuple[PriorSettings, int], _PriorRun] = {}

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture every number of images."""
        for settings, rows in product(self._shapes, self._rows):
            if run := self._capture(settings, rows):
                self._captured[settings, rows] = run

    def _capture(self, settings: PriorSettings, rows: int) -> _PriorRun | None:
        steps, width = self._shapes[settings]
        text = torch.zeros(rows, width, dtype=self._dtype, device=self._device)
        noise = torch.zeros(steps, rows, width, device=self._device)
        name = f"the prior of {rows} images in {settings.steps} steps"
        recording = capture(
            self._recorder, lambda: self.eager(text, noise, settings), name, self.counters
        )
        return None if recording is None else _PriorRun(text, noise, recording)

    @torch.inference_mode()
    def __call__(self, text: Tensor, noise: Tensor, settings: PriorSettings) -> Tensor:
        """Compute as `PriorFn`; more images than any graph has are computed eagerly."""
        B = len(text)
        known = (rows for each, rows in self._captured if each == settings and rows >= B)
        rows = min(known, default=None)
        if rows is None:
            return self.eager(text, noise, settings)
        run = self._captured[settings, rows]
        run.text[:B] = text
        run.noise[:, :B] = noise
        run.recording.replay()
        self.counters["graph_replays", ""] += 1
        return run.recording.output[:B].clone()  # the next replay writes to the same place


class DecodeGraphs:
    """Replace a pipeline's `decode_tokens`: one graph for each grid (H, W) and number of images.

    recorder: as for `PriorGraphs`; it may be the same one, which runs in the same stream.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        grids: Iterable[tuple[int, int]],
        rows: Iterable[int],
        recorder: Recorder,
        counters: Counter[Count],
    ) -> None:
        self.eager: DecodeFn = pipeline.decode_tokens
        self.counters, self._recorder = counters, recorder
        self._device = pipeline.device
        # The largest first: the others then find their memory in the pool.
        shapes = {(B, *grid) for grid, B in product(grids, rows)}
        self._shapes = sorted(shapes, key=lambda shape: -torch.Size(shape).numel())
        self._captured: dict[tuple[int, int, int], tuple[Tensor, Recording]] = {}

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture every grid and number of images."""
        for shape in self._shapes:
            tokens = torch.zeros(shape, dtype=torch.int64, device=self._device)
            if recording := self._capture(tokens):
                self._captured[shape] = tokens, recording

    def _capture(self, tokens: Tensor) -> Recording | None:
        name = f"the images of {tuple(tokens.shape)} tokens"
        return capture(self._recorder, lambda: self.eager(tokens), name, self.counters)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Compute as `DecodeFn`.

        Other grids, and more images than any graph has, are computed eagerly.
        """
        B, H, W = tokens.shape
        shape = min(
            (shape for shape in self._captured if shape[0] >= B and shape[1:] == (H, W)),
            default=None,
        )
        if shape is None:
            return self.eager(tokens)
        static, recording = self._captured[shape]
        static[:B] = tokens
        recording.replay()
        self.counters["graph_replays", ""] += 1
        return recording.output[:B].clone()  # the next replay writes to the same place
