"""Define recorders for the checks: spoil outputs before every replay, or do without CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from server.engine.cuda_graphs import CUDARecorder, Function, Recorder, Recording


@dataclass(frozen=True)
class _Rerun:
    function: Function
    output: Tensor

    def replay(self) -> None:
        self.output.copy_(self.function())


def rerun(function: Function) -> Recording:
    """Return a recording that calls the function again, to test everything around the graph."""
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
    """Return a recorder that spoils outputs before every replay.

    An output that is not written is NaN, or a code that does not exist, and shows in later results.
    """
    return lambda function: _Poisoned(recorder(function))


def poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, or with codes that do not exist, for this context.

    An output that a kernel does not write shows.
    """
    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patches.enter_context(patch.object(owner, name, _spoiling(getattr(owner, name))))
        yield


def _spoiling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: poison(make(*arguments, **options))
