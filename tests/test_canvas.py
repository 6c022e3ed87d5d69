from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.canvas import FEATHER, composite, crop, extend, outpaint_canvas, pad_to_multiple

sides = st.integers(1, 40)
margins = st.integers(0, 50)
seeds = st.integers(0, 2**32 - 1)


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def distance_to(kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[H, W] → chessboard distance to the nearest kept pixel, by definition."""
    points = np.argwhere(kept)
    grid = np.indices(kept.shape).transpose(1, 2, 0)
    return np.abs(grid[:, :, None] - points).max(-1).min(-1)


@given(sides, sides, st.integers(1, 33))
@settings(max_examples=50)
def test_cropping_undoes_padding_to_the_next_multiple(width: int, height: int, step: int) -> None:
    rgb = picture(width, height)
    padded = pad_to_multiple(rgb, step)
    assert padded.shape == (-(-height // step) * step, -(-width // step) * step, 3)
    np.testing.assert_array_equal(crop(padded, width, height), rgb)
    np.testing.assert_array_equal(
        crop(pad_to_multiple(rgb[..., 0] > 99, step), width, height), rgb[..., 0] > 99
    )


def test_padding_mirrors_without_repeating_the_edge() -> None:
    row = np.arange(5, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    assert pad_to_multiple(row, 8)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert extend(row, left=2)[0, :, 0].tolist() == [2, 1, 0, 1, 2, 3, 4]


def test_a_crop_larger_than_the_array_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot crop 4x4 to 5x4"):
        crop(picture(4, 4), 5, 4)


@given(sides, sides, margins, margins, margins, margins)
@settings(max_examples=50)
def test_the_canvas_holds_the_picture_where_its_keep_mask_says(
    width: int, height: int, left: int, right: int, up: int, down: int
) -> None:
    rgb = picture(width, height)
    canvas, kept = outpaint_canvas(rgb, left=left, right=right, up=up, down=down)
    assert canvas.shape == (height + up + down, width + left + right, 3)
    assert canvas.dtype == np.uint8
    assert kept.shape == canvas.shape[:2]
    assert kept.sum() == width * height
    np.testing.assert_array_equal(canvas[up : up + height, left : left + width], rgb)
    np.testing.assert_array_equal(canvas[kept].reshape(rgb.shape), rgb)


@given(st.integers(1, 20), st.integers(1, 20), seeds, st.floats(0, 1), st.integers(0, 6))
@settings(max_examples=60)
def test_kept_pixels_return_and_only_a_rim_of_the_others_is_mixed(
    width: int, height: int, seed: int, share: float, feather: int
) -> None:
    original, painted = picture(width, height, seed), picture(width, height, seed + 1)
    kept = np.random.default_rng(seed).random((height, width)) < share
    result = composite(original, painted, kept, feather)
    assert (result.shape, result.dtype) == (original.shape, np.uint8)
    np.testing.assert_array_equal(result[kept], original[kept])
    deep = distance_to(kept) > feather if kept.any() else np.ones_like(kept)
    np.testing.assert_array_equal(result[deep], painted[deep])


@given(seeds)
@settings(max_examples=20)
def test_what_was_masked_never_shows_through(seed: int) -> None:
    original, painted = picture(24, 24, seed), picture(24, 24, seed + 1)
    kept = np.random.default_rng(seed).random((24, 24)) < 0.5
    hidden = np.where(kept[..., None], original, 0).astype(np.uint8)
    np.testing.assert_array_equal(
        composite(original, painted, kept), composite(hidden, painted, kept)
    )


def test_the_seam_goes_evenly_from_kept_to_painted() -> None:
    original, painted = np.full((9, 30, 3), 200, np.uint8), np.full((9, 30, 3), 20, np.uint8)
    kept = np.zeros((9, 30), dtype=np.bool_)
    kept[:, :10] = True
    row = composite(original, painted, kept)[4, :, 0].tolist()
    assert row == [200] * 10 + [200 - 20 * d for d in range(1, FEATHER + 1)] + [20] * (20 - FEATHER)


@pytest.mark.parametrize("everything", [True, False])
def test_all_kept_is_the_original_and_nothing_kept_is_what_was_painted(everything: bool) -> None:
    original, painted = picture(9, 7, 1), picture(9, 7, 2)
    result = composite(original, painted, np.full((7, 9), everything))
    np.testing.assert_array_equal(result, original if everything else painted)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        composite(picture(4, 4), picture(4, 4), np.ones((4, 5), dtype=np.bool_))
