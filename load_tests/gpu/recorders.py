"""Recorders for the checks: outputs that are spoiled before every replay, and, where there is no CUDA, functions that are called again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.recording import CUDARecorder, Function, Recorder, Recording


@dataclass(frozen=True)
class _Rerun:
    function: Function
    output: Tensor

    def replay(self) -> None:
        self.output.copy_(self.function())


def rerun(function: Function) -> Recording:
    """What a graph does, by calling the function again: it tests everything around the graph."""
    return _Rerun(function, function())


def recorder_for(device: torch.device) -> Recorder:
    return CUDARecorder(device) if device.type == "cuda" else rerun


@dataclass(frozen=True)
class _Poisoned:
    recording: Recording

    @property
    def output(self) -> Tensor:
        return self.recording.output

    def replay(self) -> None:
        poison(self.output)
        self.recording.replay()


def poisoned(recorder: Recorder) -> Recorder:
    """What a replay does not write is NaN, or a code that does not exist, and shows in whatever is computed from it."""
    return lambda function: _Poisoned(recorder(function))


def poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
