"""Name the backgrounds: the palette's colours and the scenes that `backgrounds.paint` draws.

Needs no torch.
"""

from __future__ import annotations

from model.training.palette import NAMES

SCENES: tuple[str, ...] = (
    "day sky",
    "sunset",
    "starry night",
    "sea",
    "meadow",
    "desert",
    "snow",
    "forest",
    "space",
    "beach",
    "mountains",
    "city",
    "underwater",
    "room",
)
BACKGROUNDS: tuple[str, ...] = (*NAMES, *SCENES)

# The height of the horizon, as a share of the image from its top; things stand or float below it.
# None: no ground.
HORIZON: dict[str, float | None] = {
    "day sky": None,
    "sunset": None,
    "starry night": None,
    "sea": 0.5,
    "meadow": 0.56,
    "desert": 0.56,
    "snow": 0.56,
    "forest": 0.66,
    "space": None,
    "beach": 0.62,
    "mountains": 0.72,
    "city": 0.78,
    "underwater": None,
    "room": 0.7,
}
GROUND: dict[str, bool] = {name: HORIZON.get(name) is not None for name in BACKGROUNDS}
