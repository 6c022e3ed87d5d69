"""The first judge's training: what it is shown, what it is told, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.training import judge as module
from model.training.art import shapes
from model.training.augment import blocky, damaged, warped
from model.training.detector import CELL, CROP, GREY, NATIVE, Detector
from model.training.judge import Scatter, place_loss, scaled, targets
from model.training.kinds import NAMES_OF_KINDS, SHAPES, backgrounds_for
from model.training.render import Layouts
from model.training.scenery import BACKGROUNDS

GRID = (NATIVE // CELL, NATIVE // CELL)


@pytest.fixture(scope="module")
def scatter() -> Scatter:
    return Scatter()


@pytest.fixture(scope="module")
def atlas() -> Tensor:
    """Return shapes, and squares of random colours for all objects."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(
        0, 256, (len(NAMES_OF_KINDS) - len(SHAPES), 4, 1, 1), generator=generator
    )
    colours[:, 3] = 255
    return torch.cat([shapes(16), colours.to(torch.uint8).expand(-1, -1, 16, 16)])


def test_things_lie_in_the_picture_apart_from_each_other(scatter: Scatter) -> None:
    torch.manual_seed(0)
    layouts, box = scatter(256)
    there = layouts.sprite >= 0
    close = layouts.length.amax(1) > NATIVE
    low, high = layouts.centre - box / 2, layouts.centre + box / 2
    inside = ((low >= 0) & (high <= NATIVE)).all(-1)
    assert inside[there & ~close[:, None]].all()
    assert 0 < int(close.sum()) < 50
    for i in range(4):
        for j in range(i):
            shared = torch.minimum(high[:, i], high[:, j]) - torch.maximum(low[:, i], low[:, j])
            both = there[:, i] & there[:, j]
            assert not ((shared > 0).all(-1) & both).any()


def test_objects_can_be_seen_before_their_backgrounds(scatter: Scatter) -> None:
    torch.manual_seed(1)
    layouts, _ = scatter(64)
    for background, sprites in zip(
        layouts.background.tolist(), layouts.sprite.tolist(), strict=True
    ):
        for sprite in sprites:
            if sprite >= len(SHAPES):
                assert BACKGROUNDS[background] in backgrounds_for(sprite)


def test_targets_say_where_a_things_middle_lies() -> None:
    layouts = Layouts.blank(1)
    layouts.sprite[0, 0], layouts.length[0, 0] = 3, 96
    layouts.centre[0, 0] = torch.tensor([100.0, 40.0])
    box = torch.zeros(1, 4, 2)
    box[0, 0] = torch.tensor([96.0, 64.0])
    right = targets(layouts, box, GRID)
    assert int(right.heat.flatten().argmax()) == int(right.cells[0, 0]) == 2 * 16 + 6
    assert right.heat.amax() == 1
    assert right.there.tolist() == [[1, 0, 0, 0]]
    offset = torch.tensor([100 / 16 - 6.5, 40 / 16 - 2.5])
    assert torch.allclose(right.boxes[0, 0], torch.cat([offset, torch.tensor([6.0, 4.0]).log2()]))


def test_a_finder_that_answers_right_has_little_loss(scatter: Scatter) -> None:
    torch.manual_seed(2)
    layouts, box = scatter(8)
    right = targets(layouts, box, GRID)
    seen = Detector().finder(torch.rand(8, 3, 64, 64))
    perfect = seen._replace(
        middles=torch.where(right.heat >= 1, 12.0, -12.0),
        boxes=seen.boxes.detach()
        .flatten(1, 2)
        .scatter(1, right.cells[..., None].expand(-1, -1, 4), right.boxes)
        .view_as(seen.boxes),
        background=12 * torch.nn.functional.one_hot(right.background, len(BACKGROUNDS)).float(),
    )
    assert float(place_loss(perfect, right)[0].detach()) < 0.05
    assert float(place_loss(seen, right)[0].detach()) > 1


def test_crops_are_of_every_kind_with_grey_beyond_the_box(scatter: Scatter, atlas: Tensor) -> None:
    torch.manual_seed(3)
    crops, kinds = scatter.crops(64, atlas)
    assert crops.shape == (64, 3, CROP, CROP)
    assert float(crops.min()) >= 0
    assert float(crops.max()) <= 1
    assert len(kinds.unique()) > 50
    narrow = scatter.sizes[kinds].amin(1) < 0.5
    greys = (crops == GREY).all(1).float().mean((1, 2))
    assert greys[narrow].mean() > greys[~narrow].mean()


def test_layouts_are_scaled_with_their_pictures(scatter: Scatter) -> None:
    layouts, _ = scatter(4)
    half = scaled(layouts, 0.5)
    assert torch.equal(half.centre * 2, layouts.centre)
    assert torch.equal(half.length * 2, layouts.length)


@pytest.mark.parametrize("size", [(64, 64), (48, 48), (64, 96)])
def test_damage_keeps_pictures_pictures(size: tuple[int, int]) -> None:
    torch.manual_seed(4)
    pictures = torch.rand(6, 3, *size)
    worse = damaged(pictures)
    assert worse.shape == pictures.shape
    assert float(worse.min()) >= 0
    assert float(worse.max()) <= 1
    assert not torch.equal(worse, pictures)


def test_damage_without_strength_changes_nothing() -> None:
    pictures, none = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 1, 1)
    assert torch.allclose(warped(pictures, none), pictures, atol=1e-4)
    assert torch.allclose(blocky(pictures, none), pictures, atol=1e-3)


@pytest.mark.training
def test_training_writes_a_judge(
    atlas: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "atlas", lambda side: atlas)
    out = tmp_path / "detector.safetensors"
    arguments = ["judge", "--steps", "2", "--batch", "8", "--device", "cpu", "--out", str(out)]
    checkpoint = ["--checkpoint", str(tmp_path / "judge.pt")]
    monkeypatch.setattr("sys.argv", arguments + checkpoint)
    module.main()
    assert (
        Detector.load(out).features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).isfinite().all()
    )
