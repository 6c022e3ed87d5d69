"""The decoder as CUDA graphs, one for every recorded grid and number of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from model.pipeline import Pictures, Pipeline
from server.engine.protocol import Count
from server.engine.recording import Recorder, Recording, recorded


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
