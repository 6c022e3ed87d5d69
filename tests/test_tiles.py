"""Tiles of a larger image: they cover it, overlap, and are blended without a seam."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from model.canvas import Pixels
from model.tiles import BLEND, OVERLAP, Mosaic, Tiling, lanczos

TOKEN = 4
SIZES = [
    ((64, 64), (64, 64)),
    ((80, 64), (64, 64)),
    ((128, 96), (64, 64)),
    ((256, 208), (64, 32)),
    ((1024, 1024), (256, 256)),
    ((16, 48), (16, 16)),
    ((32, 256), (64, 64)),
]


def noise(width: int, height: int, seed: int = 1) -> Pixels:
    generator = np.random.default_rng(seed)
    return generator.integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("canvas", "largest"), SIZES)
def test_tiles_cover_the_canvas_begin_at_tokens_and_overlap(
    canvas: tuple[int, int], largest: tuple[int, int]
) -> None:
    tiling = Tiling.of(canvas, largest, TOKEN)
    covered = np.zeros(canvas[::-1], dtype=np.uint8)
    corners = [tiling.corner(i) for i in range(len(tiling))]
    assert len(set(corners)) == len(corners)
    for i, (x, y) in enumerate(corners):
        assert x % TOKEN == y % TOKEN == 0
        assert tiling.part(covered, i).shape == tiling.tile[::-1]
        tiling.part(covered, i)[...] += 1
    assert covered.min() == 1
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in corners})
        least = tiling.tile[axis] // OVERLAP - TOKEN
        assert all(one + tiling.tile[axis] - other >= least for one, other in pairwise(starts))


@pytest.mark.parametrize(("canvas", "largest"), SIZES)
def test_parts_of_an_image_are_blended_to_the_same_image(
    canvas: tuple[int, int], largest: tuple[int, int]
) -> None:
    tiling, image = Tiling.of(canvas, largest, TOKEN), noise(*canvas)
    parts = [tiling.part(image, i) for i in range(len(tiling))]
    assert np.array_equal(tiling.blend(parts), image)


def test_tiles_that_differ_fade_into_each_other_between_their_borders() -> None:
    tiling = Tiling.of((112, 64), (64, 64), TOKEN)
    assert [tiling.corner(i) for i in range(len(tiling))] == [(0, 0), (48, 0)]
    drawn = [np.full((64, 64, 3), value, dtype=np.uint8) for value in (0, 200)]
    line = tiling.blend(drawn)[32, :, 0].astype(int)
    assert set(line[:52]) == {0}
    assert set(line[60:]) == {200}
    assert (np.diff(line) >= 0).all()
    assert np.diff(line).max() <= 200 / (64 // BLEND) + 1


def test_a_stage_is_reached_when_all_tiles_have_come_as_far() -> None:
    tiling = Tiling.of((112, 64), (64, 64), TOKEN)
    mosaic, tile = Mosaic(tiling), noise(64, 64)
    assert mosaic.put(0, 0, tile) is None
    assert mosaic.put(0, 1, tile) is None
    assert mosaic.put(1, 0, tile) == 0
    assert mosaic.put(1, 2, tile) == 1
    assert mosaic.put(1, 3, tile) is None
    assert mosaic.put(0, 3, tile) == 3
    assert mosaic.blend().shape == (64, 112, 3)


def test_an_image_is_scaled_and_mirrored_to_the_canvas() -> None:
    image = noise(20, 10)
    assert np.array_equal(lanczos(image, (20, 10)), image)
    larger = lanczos(image, (50, 25), (64, 32))
    assert larger.shape == (32, 64, 3)
    assert np.array_equal(larger[:25, :50], lanczos(image, (50, 25)))
    assert np.array_equal(larger[:25, 50:], larger[:25, 35:49][:, ::-1])
    assert lanczos(image[..., 0], (40, 20)).shape == (20, 40)
