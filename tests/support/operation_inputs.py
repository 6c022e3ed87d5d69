"""Inputs of every operation for a runner of random weights, and the tokens drawn."""

from __future__ import annotations

import numpy as np
import torch

from model.image_request import Edit, InputImage, Keyframe, Reference, Region, Repaint
from server.engine.job import Job
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId


def picture(seed: int = 0, width: int = 32, height: int = 32) -> InputImage:
    return InputImage.of(
        np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    )


def mask(*corner: int) -> InputImage:
    """White from (0, 0) to the corner (x, y)."""
    white = np.zeros((32, 32), dtype=np.bool_)
    white[: corner[1], : corner[0]] = True
    return InputImage.of(white)


def weight(value: int = 255) -> InputImage:
    return InputImage.of(np.full((32, 32), value, dtype=np.uint8))


CANVAS = Repaint(picture(), mask(16, 32))
EVERY_KIND = {
    "inpaint": {"canvas": CANVAS},
    "edit": {"canvas": Edit(picture(), 0.5)},
    "variations": {"references": (Reference(picture(1), 0.3), Reference(picture(2, 20, 50), 0.7))},
    "interpolate": {
        "seeds": (0, 0, 0),
        "keyframes": (Keyframe("red apple"), Keyframe("", picture(3))),
    },
    "regions": {"regions": (Region("on and on", weight(128)), Region("apple", weight(128)))},
}


def drawn(runner: Runner, *jobs: Job) -> list[torch.Tensor]:
    """Every image's tokens."""
    runner.start([(each, range(len(each.seeds))) for each in jobs], Stopwatch())
    rows = [RowId(each.id, i) for each in jobs for i in range(len(each.seeds))]
    while left := [row for row in rows if not runner.rows[row].done]:
        runner.step(jobs[0].model, left)
    return [runner.rows[row].tokens for row in rows]


def tokens_of(runner: Runner, shown: InputImage) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(shown.content), dtype=torch.uint8).view(
        1, shown.height, shown.width, 3
    )
    return runner.pipelines["random"].encode_images(pixels)[0]
