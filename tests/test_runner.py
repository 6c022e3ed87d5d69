"""What the runner remembers of prompts and priors, how it batches what it has to compute, and what it decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.pipeline import Pipeline
from server.engine.conditions import size, tensors_in
from server.engine.protocol import Job
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from tests.test_worker import SAMPLING, job


class Calls:
    """What the encoders and the prior were called with."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[Sequence[str]] = []
        self.priors: list[int] = []
        encode, image_embeddings = pipeline.encode, pipeline.image_embeddings
        monkeypatch.setattr(pipeline, "encode", lambda prompts: self.texts.append(prompts) or encode(prompts))
        monkeypatch.setattr(pipeline, "image_embeddings", lambda p, noises: self.priors.append(len(p)) or image_embeddings(p, noises))


@pytest.fixture
def fresh(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """With nothing remembered."""
    monkeypatch.setattr(runner.cache, "capacity", 0)
    runner.cache.fetch("text", ["makes it give up everything"], list)
    monkeypatch.undo()
    yield runner
    runner.drop(list(runner._rows))


@pytest.fixture
def calls(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(runner._pipelines["random"], monkeypatch)


def drawn(runner: Runner, *jobs: Job) -> list[list[torch.Tensor]]:
    """Tokens of every job's images."""
    runner.start([(each, range(len(each.seeds))) for each in jobs], Stopwatch())
    rows = [[RowId(each.id, i) for i in range(len(each.seeds))] for each in jobs]
    for _ in range(SAMPLING.steps):
        runner.step("random", [row for own in rows for row in own])
    return [[runner._rows[row].tokens for row in own] for own in rows]
