"""The second judge: it needs no training, and reads shapes and sprites of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model.training import backdrops
from model.training.art import shapes
from model.training.backgrounds import paint
from model.training.benchmark import rendered
from model.training.checker import check
from model.training.close_ups import CloseUps
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.palette import NAMES
from model.training.regions import Group, candidates, cropped, partition
from model.training.scenery import BACKGROUNDS
from model.training.scenes import Scene, Thing
from model.training.templates import Templates
from tests.support.judging import shape_scenes

OBJECTS = NAMES_OF_KINDS[len(SHAPES) : len(SHAPES) + 4]


def drawn_sprites(side: int = 128) -> Tensor:
    """Return four sprites RGBA [4, 4, side, side], each of two colours."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    outlines = (x**2 + y**2 < 1, (x.abs() < 0.6), (x + y).abs() < 1, x.abs() + 0.4 * y.abs() < 0.9)
    halves = (x > 0, y > 0, x**2 + y**2 < 0.3, (4 * y).long() % 2 == 0)
    colours = torch.tensor([[200, 40, 40], [40, 160, 60], [240, 220, 60], [70, 60, 190]])
    sprites = []
    for i, (outline, half) in enumerate(zip(outlines, halves, strict=True)):
        rgb = torch.where(half, colours[i][:, None, None], colours[(i + 1) % 4][:, None, None])
        sprites.append(torch.cat([rgb * outline, 255 * outline[None].long()]))
    return torch.stack(sprites).to(torch.uint8)


@pytest.fixture(scope="module")
def atlas() -> Tensor:
    return torch.cat([shapes(128), drawn_sprites()])


@pytest.fixture(scope="module")
def few_paintings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backdrops, "VARIANTS", 2)
        yield


@pytest.fixture(scope="module")
def judge(atlas: Tensor, few_paintings: None) -> Templates:
    return Templates(atlas)


def test_shapes_are_read(judge: Templates, atlas: Tensor) -> None:
    scenes = shape_scenes()
    readings = judge.read(rendered(scenes, [0] * len(scenes), atlas))
    assert all(check(r, scene).all for r, scene in zip(readings, scenes, strict=True))


def test_objects_are_told_apart_counted_and_placed(judge: Templates, atlas: Tensor) -> None:
    one, two, three, four = (Thing(name, None) for name in OBJECTS)
    scenes = [
        Scene("white", (one, two), "left of"),
        Scene("black", (three, four), "above"),
        Scene("gray", (Thing(OBJECTS[0], None, count=4),)),
        Scene("cyan", (Thing(OBJECTS[3], None, side="right"),)),
        Scene("pink"),
    ]
    readings = judge.read(rendered(scenes, [1] * len(scenes), atlas))
    assert all(check(r, scene).all for r, scene in zip(readings, scenes, strict=True))


def test_noise_and_blur_hardly_matter(judge: Templates, atlas: Tensor) -> None:
    scenes = [Scene("white", (Thing(name, None),)) for name in OBJECTS]
    pictures = rendered(scenes, [2] * 4, atlas).permute(0, 3, 1, 2).float()
    blurred = torch.nn.functional.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False)
    torch.manual_seed(0)
    damaged = (blurred + 12 * torch.randn_like(blurred)).clamp(0, 255).to(torch.uint8)
    readings = judge.read(damaged.permute(0, 2, 3, 1))
    assert all(check(r, scene).all for r, scene in zip(readings, scenes, strict=True))


def test_painted_scenes_are_recognised_and_things_before_them(few_paintings: None) -> None:
    numbers = torch.arange(len(NAMES), len(BACKGROUNDS))
    params = torch.rand(len(numbers), 8)
    params[:, 3] = 0.75  # the second of two variants
    pictures = paint(numbers, params, 128, 128) / 255
    found, behind = backdrops.Backdrops(torch.device("cpu")).find(pictures)
    assert found == numbers.tolist()
    pictures[:, :, 40:90, 40:90] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    found, _ = backdrops.Backdrops(torch.device("cpu")).find(pictures)
    assert found == numbers.tolist()
    assert behind.shape == pictures.shape


def test_a_close_up_is_recognised_by_what_is_left_of_it(atlas: Tensor) -> None:
    close = CloseUps(atlas)
    scenes = [Scene("white", (Thing(name, None),), close_up=True) for name in OBJECTS[:3]]
    pictures = rendered(scenes, [3] * 3, atlas).permute(0, 3, 1, 2).float() / 255
    found = [close.find(picture) for picture in pictures]
    assert [NAMES_OF_KINDS[one.kind] for one in found] == list(OBJECTS[:3])
    assert all(one.length > 1.05 for one in found)


def test_things_beyond_two_edges_are_cropped() -> None:
    labels = np.zeros((32, 32), np.int32)
    labels[8:24, 8:24] = 1
    assert not cropped(labels)
    labels[8:24, :] = 1
    assert cropped(labels)


def test_near_regions_may_be_parts_of_one_thing() -> None:
    labels = np.zeros((128, 128), np.int32)
    labels[20:60, 20:60], labels[20:60, 66:90], labels[100:120, 20:60] = 1, 2, 3
    members = {group.regions for group in candidates(0, labels)}
    assert members == {(1,), (2,), (3,), (1, 2)}


def test_a_partition_prefers_few_things_that_explain_as_much() -> None:
    def group(*regions: int) -> Group:
        return Group(0, regions, (0, 0, 9, 9), 81)

    groups = [group(1), group(2), group(1, 2)]
    together = partition(groups, [3.0, 3.0, 2.0], [10, 10, 20])
    apart = partition(groups, [1.0, 1.0, 15.0], [10, 10, 20])
    assert [one.regions for one in together] == [(1, 2)]
    assert [one.regions for one in apart] == [(1,), (2,)]
    assert partition([], [], []) == []
