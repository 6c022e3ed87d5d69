"""The fixed prompts that trained weights are judged by. They were drawn once from a seed, or written down, and are not tuned."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from model.training.captions import describe
from model.training.scenes import Scene, sample_object, sample_pair, sample_shape

_SEED = 20221114  # far from the small seeds that trainings take

CONTACT_SHEET: tuple[str, ...] = (
    "a red apple on a white background",
    "a big yellow star on a black background",
    "a cat on a blue background",
    "a blue circle next to a green square on white",
    "a small red heart on the left, white background",
    "a sunflower on a purple background",
    "a large purple ring on yellow",
    "a red car on a cyan background",
    "a banana on a blue background",
    "a red star and a blue heart on white",
    "a house on a green background",
    "an orange triangle on a gray background",
    "a dog on a yellow background",
    "a black diamond above a white circle on red",
    "a green cactus on an orange background",
    "the sun at the top, blue background",
    "a pink heart on a black background",
    "a blue fish on white",
    "a tree left of a house on a pink background",
    "a strawberry on a cyan background",
    "a tiny white circle in the middle of a blue background",
    "a red mushroom on a black background",
    "a cyan crescent on the right, purple background",
    "a soccer ball on a green background",
    "a huge green triangle on a white background",
    "a slice of pizza on a blue background",
    "an umbrella on a yellow background",
    "a brown cross on a white background",
    "a yellow square below a red ring on black",
    "an apple and a banana on a purple background",
    "a gray star at the bottom of an orange background",
    "a plain blue background",
)


def _draw(sample: Callable[[np.random.Generator], Scene], n: int, stream: int) -> list[tuple[str, Scene]]:
    rng = np.random.default_rng([_SEED, stream])
    scenes = [sample(rng) for _ in range(n)]
    return [(describe(scene, rng, complete=True).text, scene) for scene in scenes]


@lru_cache(maxsize=1)
def _singles() -> tuple[list[tuple[str, Scene]], list[tuple[str, Scene]]]:
    return _draw(sample_shape, 120, 1), _draw(sample_object, 60, 2)


def evaluation_prompts() -> list[tuple[str, Scene]]:
    """240 prompts that leave nothing to chance, each with its scene: 120 single shapes, 60 single objects, 60 pairs.

    Raises FileNotFoundError without the emoji font, which decides what is visible in front of what.
    """
    shapes, objects = _singles()
    return [*shapes, *objects, *_draw(sample_pair, 60, 3)]


def first_hundred() -> list[tuple[str, Scene]]:
    """A quick look: 67 of the single shapes and 33 of the single objects."""
    shapes, objects = _singles()
    return [*shapes[:67], *objects[:33]]
