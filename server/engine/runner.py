"""The tensors of the worker: rows are started (encode, prior, condition), stepped together, and decoded.

The same arithmetic may round differently at another batch size. What a deterministic job needs is therefore computed for one prompt or
one image at a time, here and, since the scheduler gives each of its rows a pool of its own, in every step and in decoding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from model.config import find_bundle
from model.operations import Row
from model.pipeline import Pipeline, Prompt
from model.runtime import pick_device, pick_dtype
from server.engine.protocol import Image, Job
from server.engine.scheduler import RowId
from server.settings import Settings

_CACHED_PROMPTS = 128


class _Text(NamedTuple):
    """What a prompt's encoding depends on; together: its batch may have held others."""

    model: str
    prompt: str
    together: bool


@dataclass
class Stopwatch:
    """Seconds per stage. began: when the last one began, on the performance counter."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.began = time.perf_counter()
        yield
        self._count(stage, time.perf_counter() - self.began)

    def add(self, other: Stopwatch) -> None:
        for stage, seconds in other.seconds.items():
            self._count(stage, seconds)

    def _count(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class Runner:
    """The loaded bundles, and the rows that are being denoised on them."""

    def __init__(self, settings: Settings) -> None:
        device = pick_device(settings.device)
        self.dtype = pick_dtype(settings.dtype, device)
        self.device = device
        loaded = [Pipeline.load(find_bundle(name), device, self.dtype) for name in settings.bundles]
        self._pipelines = {pipeline.config.name: pipeline for pipeline in loaded}
        self._rows: dict[RowId, Row] = {}
        self._prompts: dict[_Text, Prompt] = {}

    def start(self, job: Job, indices: Sequence[int], watch: Stopwatch) -> tuple[str, ...]:
        """Makes rows of these images of a job; returns the encoders that cut its prompt."""
        pipeline, together = self._pipelines[job.model], not job.sampling.deterministic
        with watch("encode"):
            prompt, negative = self._encode(pipeline, (job.prompt, job.negative_prompt), together)
            unconditional = pipeline.condition(negative) if job.sampling.guided else None
        with watch("prior"):
            noises = [pipeline.noise(job.seeds[i], job.width, job.height, job.sampling.steps) for i in indices]
            batches = [noises] if together else [[noise] for noise in noises]
            images = [image for batch in batches for image in pipeline.image_embeddings([prompt] * len(batch), batch)]
            conditions = [pipeline.condition(prompt, image) for image in images]
        for i, noise, condition in zip(indices, noises, conditions, strict=True):
            self._rows[RowId(job.id, i)] = pipeline.start(noise, job.sampling, condition, unconditional)
        return prompt.truncated

    def _encode(self, pipeline: Pipeline, prompts: Sequence[str], together: bool) -> list[Prompt]:
        """Encoded prompts; the latest ones are remembered, the empty one above all. together: whether they may share a batch."""
        texts = [_Text(pipeline.config.name, prompt, together) for prompt in prompts]
        unknown = [text for text in dict.fromkeys(texts) if text not in self._prompts]
        batches = [unknown] if together and unknown else [[text] for text in unknown]
        fresh = {t: p for batch in batches for t, p in zip(batch, pipeline.encode([text.prompt for text in batch]), strict=True)}
        for text in texts:
            encoded = self._prompts.pop(text, None) or fresh[text]
            self._prompts[text] = encoded  # at the end: used last
        answer = [self._prompts[text] for text in texts]
        while len(self._prompts) > _CACHED_PROMPTS:
            del self._prompts[next(iter(self._prompts))]
        return answer

    def step(self, model: str, rows: Sequence[RowId]) -> list[RowId]:
        """One denoiser step for rows of one pool; returns those that are now done."""
        self._pipelines[model].advance([self._rows[row] for row in rows])
        return [row for row in rows if self._rows[row].done]

    def decode(self, model: str, rows: Sequence[RowId]) -> list[Image]:
        """Finished rows of one pool → pictures; their slots are free afterwards."""
        pictures = self._pipelines[model].decode(torch.stack([self._rows[row].tokens for row in rows]))
        self.drop(rows)
        _, height, width, _ = pictures.shape
        return [Image(row.index, width, height, picture.numpy().tobytes()) for row, picture in zip(rows, pictures, strict=True)]

    def drop(self, rows: Sequence[RowId]) -> None:
        """Forgets rows that nobody waits for."""
        for row in rows:
            self._rows.pop(row, None)

    def warm_up(self) -> None:
        """Runs every stage of every bundle once, so that the first request meets nothing new."""
        for pipeline in self._pipelines.values():
            pipeline.generate(["warm"], [0], pipeline.config.recipe.sampling(steps=2))
