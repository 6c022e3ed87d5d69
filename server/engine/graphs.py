"""The denoiser's step as CUDA graphs: recorded before the server is ready, replayed afterwards, never recorded again.

A pass is some hundred small kernels, and launching them one by one takes longer than running them. A graph has fixed shapes, so rows are
padded to the next recorded number and their conditions to the next recorded length; what no graph fits is computed eagerly and counted.

Letters: B rows, N branches, H W token grid, L condition tokens, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import sampling
from model.config import Sampler
from model.operations import AnyCondition
from model.pipeline import Drawing, Eager, Lanes, Pipeline
from model.runtime import send
from server.engine.buckets import Bucket, Memory
from server.engine.protocol import Count
from server.engine.recording import Function, Recorder, Recording, recorded


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
