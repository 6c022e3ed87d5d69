"""A function of tensors in fixed places, recorded once and run again on what lies there then: a CUDA graph, or what a test has for one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.engine.protocol import Count

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
