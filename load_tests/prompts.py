"""Make prompts for load tests, all of them different."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
_THINGS = ("ball", "box", "cup", "tree", "house", "star", "boat", "apple")
_PLACES = (
    "on a table",
    "under a cloud",
    "in the snow",
    "beside a lake",
    "on the grass",
    "at night",
)


def prompts() -> Iterator[str]:
    """Yield prompts that differ in their words and, when those are used up, in a number."""
    for number in itertools.count(1):
        for place, colour, thing in itertools.product(_PLACES, _COLOURS, _THINGS):
            yield f"a {colour} {thing} {place}" + (f", number {number}" if number > 1 else "")
