"""Jobs for a fake worker, and the images that answer them."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from typing import Any

from model.config import SamplingConfig
from server.engine.job import Job
from server.engine.messages import (
    Image,
)

SAMPLING = SamplingConfig(
    steps=10,
    renoise_steps=0,
    guidance=(1.0, 1.0),
    guidance_steps=0,
    temperature=(1.0, 1.0),
    sampler="argmax",
)
PIXELS = 32 * 16
ids = count()


def job(rows: int = 1, seconds: float = 1000.0, **changes: Any) -> Job:
    id, deadline = f"job{next(ids)}", time.monotonic() + seconds
    return replace(
        Job(id, "fake", "", "", 32, 16, tuple(range(rows)), SAMPLING, deadline), **changes
    )


def picture(index: int) -> Image:
    return Image(index, 32, 16, bytes(PIXELS * 3))
