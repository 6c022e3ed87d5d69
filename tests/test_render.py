"""Pictures from layouts: where sprites land, how their edges look, and backgrounds. Sprites are
shapes and drawings of the test's own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.training import art
from model.training.backgrounds import VARIANTS, paint
from model.training.kinds import SHAPES
from model.training.palette import COLOURS
from model.training.render import Layouts, _draw_all, render
from model.training.scenery import BACKGROUNDS, SCENES

pytestmark = pytest.mark.heavy

SQUARE, TRIANGLE = SHAPES.index("square"), SHAPES.index("triangle")
OBJECT = len(
    SHAPES
)  # in the atlas of these tests: green on the left, red on the right, twice as high as wide
BLUE = BACKGROUNDS.index("blue")


@pytest.fixture(scope="module")
def atlas() -> Tensor:
    sprite = torch.zeros(4, 256, 256, dtype=torch.uint8)
    sprite[3, :, 64:192] = 255
    sprite[1, :, 64:128] = 255
    sprite[0, :, 128:192] = 255
    return torch.cat([art.shapes(), sprite[None]])


def _one(sprite: int, x: float, y: float, length: float, background: int = BLUE) -> Layouts:
    layouts = Layouts.blank(1)
    layouts.background[:] = background
    layouts.sprite[0, 0], layouts.length[0, 0] = sprite, length
    layouts.centre[0, 0] = torch.tensor([x, y])
    return layouts


def _box(cover: Tensor) -> tuple[int, int, int, int]:
    rows, columns = cover.any(dim=1).nonzero()[:, 0], cover.any(dim=0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_a_sprite_lies_where_its_layout_says(atlas: Tensor) -> None:
    picture = render(_one(SQUARE, 100, 140, 96), atlas)[0]
    assert picture.shape == (3, 256, 256)
    white = (picture > 240).all(dim=0)
    assert _box(white) == (52, 92, 148, 188)
    assert int(white.sum()) == 96 * 96
    assert tuple(picture[:, 0, 0].tolist()) == COLOURS["blue"]


def test_sprites_alone_are_what_an_image_adds_to_its_background(atlas: Tensor) -> None:
    layouts = Layouts.cat([_one(OBJECT, 100, 140, 96), _one(SQUARE, 80, 60, 90)])
    alone = render(layouts, atlas, sprites_only=True)
    assert alone.shape == (2, 4, 256, 256)
    background = render(Layouts.cat([_one(-1, 0, 0, 0)] * 2), atlas).float()
    over = background * (1 - alone[:, 3:].float() / 255) + alone[:, :3]
    assert (render(layouts, atlas).float() - over).abs().max() <= 1.01


def test_the_longer_side_is_the_length(atlas: Tensor) -> None:
    picture = render(_one(OBJECT, 128, 128, 128), atlas)[0]
    assert _box(picture[2] < 100) == (96, 64, 160, 192)
    assert picture[1, 128, 100] == 255
    assert picture[0, 128, 156] == 255


def test_mirroring_swaps_left_and_right(atlas: Tensor) -> None:
    layouts = _one(OBJECT, 128, 128, 128)
    mirrored = render(replace(layouts, mirror=torch.ones_like(layouts.mirror)), atlas)[0]
    assert mirrored[0, 128, 100] == 255
    assert mirrored[1, 128, 156] == 255


def test_angles_turn_clockwise(atlas: Tensor) -> None:
    layouts = _one(OBJECT, 128, 128, 128)
    layouts.angle[:] = 90
    picture = render(layouts, atlas)[0]
    assert picture[1, 100, 128] == 255  # what was on the left is on top
    assert picture[0, 156, 128] == 255
    left, top, right, bottom = _box(picture[2] < 100)
    assert abs(left - 64) <= 1
    assert abs(top - 96) <= 1
    assert abs(right - 192) <= 1
    assert abs(bottom - 160) <= 1


def test_shapes_take_their_tint_and_objects_keep_their_colours(atlas: Tensor) -> None:
    for sprite, expected in ((SQUARE, (255, 138, 16)), (OBJECT, (0, 255, 0))):
        layouts = _one(sprite, 128, 128, 128)
        layouts.tint[:] = torch.tensor([255, 138, 16], dtype=torch.uint8)
        assert tuple(render(layouts, atlas)[0, :, 128, 110].tolist()) == expected


def test_edges_are_smooth(atlas: Tensor) -> None:
    picture = render(_one(TRIANGLE, 128, 128, 128), atlas)[0, 0]
    between = (picture > 60) & (picture < 220)
    assert 60 < int(between.sum()) < 500


def test_later_sprites_cover_earlier_ones(atlas: Tensor) -> None:
    layouts = _one(SQUARE, 128, 128, 128)
    layouts.sprite[0, 2], layouts.length[0, 2], layouts.centre[0, 2] = (
        OBJECT,
        64,
        torch.tensor([128.0, 128.0]),
    )
    picture = render(layouts, atlas)[0]
    assert tuple(picture[:, 128, 120].tolist()) == (0, 255, 0)
    assert tuple(picture[:, 128, 80].tolist()) == (255, 255, 255)


def test_a_sprite_may_lie_partly_or_wholly_outside(atlas: Tensor) -> None:
    assert int((render(_one(SQUARE, 0, 0, 64), atlas)[0, 0] > 250).sum()) == 32 * 32
    outside = render(_one(SQUARE, -200, 600, 64), atlas)[0]
    assert torch.equal(outside, render(_one(-1, 0, 0, 0), atlas)[0])


@pytest.mark.parametrize(("width", "height"), [(384, 256), (256, 384), (128, 128)])
def test_other_sizes(atlas: Tensor, width: int, height: int) -> None:
    layouts = Layouts.blank(3)
    layouts.background[:] = torch.tensor(
        [BLUE, BACKGROUNDS.index("meadow"), BACKGROUNDS.index("space")]
    )
    layouts.sprite[:, 0], layouts.length[:, 0] = SQUARE, 64
    layouts.centre[:, 0] = torch.tensor([width - 40.0, height - 40.0])
    pictures = render(layouts, atlas, width, height)
    assert pictures.shape == (3, 3, height, width)
    assert pictures.dtype == torch.uint8
    assert (pictures[:, :, height - 40, width - 40] > 250).all()


def test_batches_do_not_depend_on_their_neighbours(atlas: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    layouts = Layouts.blank(300, 2)
    layouts.background[:] = torch.randint(len(BACKGROUNDS), (300,), generator=generator)
    layouts.params[:] = torch.rand(300, 8, generator=generator)
    layouts.sprite[:] = torch.randint(-1, len(atlas), (300, 2), generator=generator)
    layouts.centre[:] = 64 * torch.rand(300, 2, 2, generator=generator)
    layouts.length[:] = 32.0
    together = render(layouts, atlas, 64, 64)
    order = torch.randperm(300, generator=generator)
    assert torch.equal(render(layouts[order], atlas, 64, 64), together[order])
    assert torch.equal(render(layouts[7:9], atlas, 64, 64), together[7:9])


def test_layouts_are_saved_and_joined(atlas: Tensor) -> None:
    first, second = _one(SQUARE, 30, 30, 20), _one(OBJECT, 90, 90, 60)
    both = Layouts.cat([first, second])
    assert len(both) == 2
    again = Layouts(**both.state()).to("cpu")
    for name, tensor in second.state().items():
        assert torch.equal(again[1:].state()[name], tensor)


def test_no_layouts_make_no_pictures(atlas: Tensor) -> None:
    assert render(Layouts.blank(0), atlas).shape == (0, 3, 256, 256)


# ── backgrounds ───────────────────────────────────────────────────────────────────────────────────


def _paint(name: str, count: int, side: int = 256) -> Tensor:
    params = torch.rand(count, 8, generator=torch.Generator().manual_seed(1))
    return paint(torch.full((count,), BACKGROUNDS.index(name)), params, side, side)


def test_plain_backgrounds_stay_close_to_their_colour() -> None:
    for name, colour in COLOURS.items():
        pictures = _paint(name, 16, 8)
        assert (pictures - torch.tensor(colour)[:, None, None]).abs().max() <= 6
        assert torch.equal(pictures.amax(dim=(2, 3)), pictures.amin(dim=(2, 3)))


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_varies_but_is_the_same_at_every_size(name: str) -> None:
    pictures = _paint(name, 4)
    assert pictures.min() >= 0
    assert pictures.max() <= 255
    assert (pictures[0] - pictures[1]).abs().mean() > 0.5
    assert (torch.nn.functional.avg_pool2d(pictures, 2) - _paint(name, 4, 128)).abs().mean() < 2


def test_scenes_differ_from_one_another_and_from_the_plain_colours() -> None:
    def look(name: str) -> Tensor:
        return torch.nn.functional.avg_pool2d(
            _paint(name, 8).mean(dim=0, keepdim=True), 32
        ).flatten()

    looks = [look(name) for name in BACKGROUNDS]
    distances = torch.cdist(torch.stack(looks), torch.stack(looks)) / len(looks[0]) ** 0.5
    distances.fill_diagonal_(1e3)
    assert distances.min() > 12


def test_all_variants_are_reached() -> None:
    params = torch.rand(2, 8)
    params[:, 3] = torch.tensor([0.0, 1.0])
    numbers = torch.full((2,), BACKGROUNDS.index("desert"))
    ends = paint(numbers, params, 32, 32)
    params[:, 3] = torch.tensor([0.5 / VARIANTS, 1 - 0.5 / VARIANTS])
    assert torch.equal(paint(numbers, params, 32, 32), ends)


def test_drawing_all_at_once_is_drawing_one_by_one(
    atlas: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU draws a slot's sprites over whole pictures."""
    layouts = Layouts.blank(6, 2)
    layouts.sprite[:] = torch.tensor(
        [[SQUARE, -1], [-1, -1], [OBJECT, TRIANGLE], [2, 3], [-1, OBJECT], [4, 5]]
    )
    layouts.centre[:] = 256 * torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0))
    layouts.length[:] = torch.where(layouts.sprite >= 0, 96.0, 0.0)
    layouts.angle[:] = 7.0
    expected = render(layouts, atlas)
    monkeypatch.setattr("model.training.render._draw_each", _draw_all)
    assert (render(layouts, atlas).int() - expected.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_pictures(atlas: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    layouts = Layouts.blank(64, 2)
    layouts.background[:] = torch.randint(len(BACKGROUNDS), (64,), generator=generator)
    layouts.params[:] = torch.rand(64, 8, generator=generator)
    layouts.sprite[:] = torch.randint(-1, len(atlas), (64, 2), generator=generator)
    layouts.centre[:] = 256 * torch.rand(64, 2, 2, generator=generator)
    layouts.length[:] = 96.0
    layouts.angle[:] = 20 * torch.rand(64, 2, generator=generator) - 10
    here, there = (
        render(layouts, atlas).int(),
        render(layouts.to("cuda"), atlas.to("cuda")).cpu().int(),
    )
    assert ((here - there).abs() > 2).float().mean() < 1e-3
