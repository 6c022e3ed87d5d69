"""Scenes and sprites for the judges, and a judge that guesses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.training.art import shapes
from model.training.checker import Found, Reading
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.scenes import SQUARE, Scene, Thing


def shape_scenes() -> list[Scene]:
    colours = ("red", "blue", "black", "yellow", "purple", "green", "white", "orange", "pink")
    backgrounds = ("white", "yellow", "pink", "black", "white", "orange", "blue", "black", "green")
    return [
        Scene(background, (Thing(shape, colour),), None, SQUARE)
        for shape, colour, background in zip(SHAPES, colours, backgrounds, strict=True)
    ]


class Guess:
    """A judge that sees a red star in everything."""

    def read(self, pictures: Tensor) -> list[Reading]:
        star = Found("star", "red", (0.5, 0.5), (0.5, 0.5), 1.0)
        return [Reading("white", (star,), (256, 256)) for _ in pictures]


@pytest.fixture(name="sprites", scope="module")
def sprites_fixture() -> Tensor:
    """Return shapes, and grey squares for all objects."""
    square = torch.full((1, 4, 16, 16), 128, dtype=torch.uint8)
    square[:, 3] = 255
    return torch.cat([shapes(16), square.expand(len(NAMES_OF_KINDS) - len(SHAPES), -1, -1, -1)])
