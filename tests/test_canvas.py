from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from load_tests import seams
from model.canvas import crop, extend, on_white, outpaint_canvas, pad_to_multiple, region_weight
from model.compositing import FAR_CORRECTION, composite
from tests.conftest import examples

sides = st.integers(1, 40)
margins = st.integers(0, 50)
seeds = st.integers(0, 2**32 - 1)


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(sides, sides, st.integers(1, 33))
@examples(50)
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
@examples(50)
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


@given(st.integers(1, 20), st.integers(1, 20), seeds, st.floats(0, 1), st.integers(0, 64))
@examples(60)
def test_kept_pixels_return_bit_for_bit(
    width: int, height: int, seed: int, share: float, feather: int
) -> None:
    original, painted = picture(width, height, seed), picture(width, height, seed + 1)
    random = np.random.default_rng(seed)
    weight = np.where(random.random((height, width)) < share, 0, random.integers(256)).astype("u1")
    result = composite(original, painted, weight, feather)
    assert (result.shape, result.dtype) == (original.shape, np.uint8)
    np.testing.assert_array_equal(result[weight == 0], original[weight == 0])
    transparent = np.dstack([original, random.integers(256, size=(height, width), dtype="u1")])
    result = composite(transparent, painted, weight, feather)
    np.testing.assert_array_equal(result[weight == 0], transparent[weight == 0])


@given(seeds)
@examples(20)
def test_what_was_masked_never_shows_through(seed: int) -> None:
    original, painted = picture(24, 24, seed), picture(24, 24, seed + 1)
    mask = np.random.default_rng(seed).random((24, 24)) < 0.5
    hidden = np.where(mask[..., None], 0, original).astype(np.uint8)
    np.testing.assert_array_equal(
        composite(original, painted, mask), composite(hidden, painted, mask)
    )


def test_without_a_feather_the_weights_alone_blend() -> None:
    original, painted = picture(9, 7, 1), picture(9, 7, 2)
    weight = np.random.default_rng(3).integers(256, size=(7, 9), dtype=np.uint8)
    share = weight[..., None] / 255
    expected = original * (1 - share) + painted * share
    assert np.abs(composite(original, painted, weight, feather=0) - expected).max() <= 0.51


def test_drawn_pixels_are_opaque_and_hidden_colours_do_not_show() -> None:
    original = np.array([[[9, 9, 9, 0], [200, 100, 0, 255], [200, 100, 0, 100]]], np.uint8)
    painted = np.full((1, 3, 3), 50, np.uint8)
    half = np.array([[128, 128, 0]], np.uint8)
    result = composite(original, painted, half, feather=0)
    assert result.tolist() == [[[50, 50, 50, 128], [125, 75, 25, 255], [200, 100, 0, 100]]]
    assert on_white(result)[0, 0].tolist() == [152, 152, 152]


@pytest.mark.parametrize("offset", [(14, 14, 16), (-9, 20, 0), (30, -31, 20)])
def test_an_offset_of_the_decoder_disappears_in_the_whole_repainted_part(
    offset: tuple[int, int, int],
) -> None:
    """Black that a decoder shows as (14, 14, 16): outpainting added panels of that colour."""
    colour = np.array([0, 0, 0] if offset == (14, 14, 16) else [100, 120, 90])
    original = np.broadcast_to(colour, (64, 96, 3)).astype(np.uint8)
    painted = (original + np.array(offset)).astype(np.uint8)
    mask = np.zeros((64, 96), dtype=np.bool_)
    mask[:, 60:] = True
    result = composite(original, painted, mask).astype(int)
    assert np.abs(result - original).max() <= 1


def test_the_part_of_a_correction_beyond_its_limit_fades_over_the_feather() -> None:
    original = np.full((64, 128, 3), 100, np.uint8)
    painted = np.full((64, 128, 3), 160, np.uint8)
    mask = np.zeros((64, 128), dtype=np.bool_)
    mask[:, 64:] = True
    row = composite(original, painted, mask, feather=16)[32, :, 0].astype(int)
    assert (row[:64] == 100).all()
    assert abs(row[64] - 100) <= 3
    assert (np.diff(row) >= 0).all()
    assert (row[64 + 16 :] == 160 - FAR_CORRECTION).all()


def test_content_that_differs_beside_a_kept_object_does_not_glow() -> None:
    """A kept red disk before a new white background, drawn two pixels smaller by the decoder."""
    y, x = np.mgrid[:128, :128]
    radius = np.hypot(x - 64, y - 64)

    def disk(size: float, background: tuple[int, int, int]) -> NDArray[np.uint8]:
        inside = (radius < size)[..., None]
        return np.where(inside, (200, 30, 30), background).astype(np.uint8)

    original, painted = disk(40, (20, 40, 160)), disk(38, (250, 250, 250))
    result = composite(original, painted, radius >= 40)
    assert np.abs(result[radius >= 40] - 250.0).max() <= 2


def test_an_exact_antialiased_mask_leaves_no_rim_of_what_it_removes() -> None:
    """A brown ring around a removed object: its edge pixels mix both colours."""
    y, x = np.mgrid[:512, :512]
    disk = PIL.Image.fromarray((np.hypot(x - 256, y - 250) < 150).astype(np.uint8) * 255)
    mask = np.asarray(disk.resize((128, 128), PIL.Image.Resampling.BOX))
    share = mask[..., None] / 255
    clean = np.broadcast_to(np.array([40, 160, 90], np.uint8), (128, 128, 3))
    original = np.rint(clean * (1 - share) + np.array([120, 60, 20]) * share).astype(np.uint8)
    assert (mask % 255 > 0).any()
    result = composite(original, clean, mask).astype(float)
    assert np.abs(result - clean).max() <= 2
    rim = composite(original, clean, mask, feather=0).astype(float)
    assert np.abs(rim - clean).max() >= 20


def test_a_soft_mask_over_what_stays_is_a_blend() -> None:
    original, painted = np.full((32, 64, 3), 50, np.uint8), np.full((32, 64, 3), 90, np.uint8)
    original[:, 48:] = 250
    ramp = np.rint(np.clip(np.arange(64) - 16, 0, 32) / 32 * 255).astype(np.uint8)
    weight = np.broadcast_to(ramp, (32, 64))
    row = composite(original, painted, weight)[16, :, 0].astype(int)
    assert (row[:16] == 50).all()
    assert (np.abs(np.diff(row[:48])) <= 1 + 40 // 16).all()


def test_texture_beside_a_removed_object_is_not_stretched() -> None:
    """Single border pixels reached eight pixels inwards as streaks."""
    random = np.random.default_rng(4)
    texture = np.clip(random.normal(120, 30, (96, 96, 3)), 0, 255).astype(np.uint8)
    painted = np.clip(random.normal(128, 20, (96, 96, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((96, 96), dtype=np.bool_)
    mask[30:70, 30:70] = True
    change = composite(texture, painted, mask).astype(float) - painted
    inside = change[30:70, 30:70]
    # An offset of 8 levels is corrected, by neighbouring pixels alike.
    assert abs(inside.mean() + 8) <= 3
    assert np.abs(np.diff(inside, axis=0)).max() <= 4


@pytest.mark.parametrize("everything", [True, False])
def test_all_kept_is_the_original_and_nothing_kept_is_what_was_painted(everything: bool) -> None:
    original, painted = picture(9, 7, 1), picture(9, 7, 2)
    result = composite(original, painted, np.full((7, 9), not everything))
    np.testing.assert_array_equal(result, original if everything else painted)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        composite(picture(4, 4), picture(4, 4), np.ones((4, 5), dtype=np.bool_))


def test_grey_levels_of_a_mask_are_shares_of_a_regions_weight() -> None:
    grey = np.array([[0, 51, 255]], np.uint8)
    assert region_weight(grey, 1.0, 0.0).tolist() == [[0, 51, 255]]
    assert region_weight(grey > 0, 0.6, 0.0).tolist() == [[0, 153, 153]]


def test_no_seam_shows_on_any_surface() -> None:
    """`python -m load_tests.seams` measures more and larger cases."""
    pairs = [pair for pair in seams.PAIRS if pair[1] in ("tight", "loose", "outpaint")]
    made = [seams.case(surface, mask, 256, (7, 0)) for surface, mask in pairs]
    figures = [seams.measured(case, seams.stand_in(case), seams.blurred(case)) for case in made]
    failed = [(*pair, each) for pair, each in zip(pairs, figures, strict=True) if not each.passes]
    assert not failed
    # The measure sees what a paste without any correction leaves.
    assert np.mean([each.pasted_ring for each in figures]) > 2 * seams.DELTA_E
