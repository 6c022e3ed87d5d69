"""Rows of a pipeline, and how far their tokens agree."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from model.config import SamplingConfig
from model.pipeline import Pipeline
from model.rows import Row

PROMPTS = ("red apple", "", "the red apple in the red apple and on and on, until it is cut", "🍎")
PLAIN = SamplingConfig(
    steps=6,
    renoise_steps=5,
    guidance=(4.0, 4.0),
    guidance_steps=6,
    temperature=(0.7, 0.3),
    sampler="multinomial",
    typical_mass=0.4,
)
UNGUIDED = replace(PLAIN, guidance=(1.0, 1.0))
SAMPLERS = ("multinomial", "argmax", "typical", "quant")


def row(
    pipeline: Pipeline, prompt: str = PROMPTS[0], seed: int = 0, config: SamplingConfig = PLAIN
) -> Row:
    noise = pipeline.noise(seed, 32, 32, config.steps, config.renoise_mode, config.renoise_order)
    encoded, negative = pipeline.encode([prompt, ""])
    (image,) = pipeline.prior_embeddings([encoded], [noise])
    return pipeline.start(
        noise, config, pipeline.condition(encoded, image), pipeline.condition(negative)
    )


def run(pipeline: Pipeline, *rows: Row) -> list[Tensor]:
    while unfinished := [r for r in rows if not r.done]:
        pipeline.advance(unfinished)
    return [r.tokens for r in rows]


def agreement(one: Tensor, other: Tensor) -> float:
    return (one == other).float().mean().item()
