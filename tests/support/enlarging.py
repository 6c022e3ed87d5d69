"""Jobs that enlarge an image by tiles."""

from __future__ import annotations

from dataclasses import replace

from model.image_request import Enlarge
from model.tiles import Tiling
from server.engine.job import Job
from tests.support.workers import SAMPLING, job

FIXED = replace(SAMPLING, deterministic=True)


def enlarging(
    width: int, height: int, strength: float = 0.5, scale: float = 1.0, **changes: object
) -> Enlarge:
    """To width × height by tiles of 32 × 32, before any padding."""
    tiling = Tiling.of((round(width * scale), round(height * scale)), (32, 32), 4)
    return replace(Enlarge(tiling, tiling.canvas, strength, FIXED), **changes)


def twice(id: str = "a", strength: float = 0.5, **changes: object) -> Job:
    """An image that is drawn at 32 × 32, then at 64 × 64 in nine tiles."""
    enlarge = enlarging(64, 64, strength)
    return replace(job(id, sampling=FIXED, enlarge=enlarge), **changes)
