"""The prior as CUDA graphs: all of its steps in one, for each of some numbers of images.

Sixty steps of forty-eight small blocks are more than ten thousand launches. They would keep the worker from stepping rows for longer than
the device takes to compute them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.pipeline import Imagine, PipelineV3
from server.engine.protocol import Count
from server.engine.recording import Recorder, Recording, recorded


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
