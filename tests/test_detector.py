"""The first judge: what its parts compute, that weights come back, how the trained one reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.training import detector as module
from model.training.art import shapes
from model.training.benchmark import rendered
from model.training.checker import Verdict, check
from model.training.detector import (
    CROP,
    GREY,
    WEIGHTS,
    Detector,
    cut,
    masked,
    overlap,
    shape_colour,
    shrunk,
)
from model.training.scenes import Scene, Thing
from tests.support.judging import shape_scenes

needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason="no trained judge: python -m model.training.judge"
)


@pytest.fixture(scope="module")
def atlas() -> Tensor:
    return shapes(128)


@pytest.fixture(scope="module")
def pictures(atlas: Tensor) -> Tensor:
    scenes = shape_scenes()
    return rendered(scenes, [0] * len(scenes), atlas)


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_shape_has_the_colour_of_the_pixels_that_it_covers(pictures: Tensor) -> None:
    for scene, picture in zip(shape_scenes(), pictures.numpy(), strict=True):
        (thing,) = scene.things
        # The box of the rendered shape: what is unlike the corner.
        unlike = np.abs(picture.astype(int) - picture[0, 0]).max(-1) > 60
        rows, columns = (np.flatnonzero(unlike.any(axis)) for axis in (1, 0))
        low = np.array([columns[0], rows[0]], np.float32)
        high = np.array([columns[-1] + 1, rows[-1] + 1], np.float32)
        assert shape_colour(picture, thing.kind, (low + high) / 2, high - low) == thing.colour


def test_a_shape_outside_the_picture_has_no_colour() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    place = np.array([90, 90], np.float32), np.array([20, 20], np.float32)
    assert shape_colour(picture, "ring", *place) is None


def test_a_crop_shows_its_box_and_grey_around() -> None:
    picture = torch.zeros(1, 3, 128, 128)
    picture[:, 0, 32:64, 64:80] = 1  # in a picture of 256: 64 … 128 down, 128 … 160 across
    crop = cut(picture, torch.tensor([[144.0, 96.0]]), torch.tensor([[32.0, 64.0]]))[0]
    assert crop.shape == (3, CROP, CROP)
    assert crop[0, CROP // 2, CROP // 2] == 1
    assert (crop[:, :, :8] == GREY).all()
    share = float((crop[0] == 1).float().mean())
    assert share == pytest.approx(0.5 / 1.12**2, abs=0.04)


def test_of_a_box_beyond_the_picture_the_part_within_is_cut() -> None:
    picture = torch.rand(1, 3, 128, 128)
    whole = cut(picture, torch.tensor([[128.0, 128.0]]), torch.tensor([[256.0, 256.0]]))
    beyond = cut(picture, torch.tensor([[128.0, 128.0]]), torch.tensor([[400.0, 400.0]]))
    assert torch.allclose(whole, beyond)


def test_a_mask_keeps_a_little_room_around_the_box() -> None:
    crops = torch.ones(1, 3, CROP, CROP)
    kept = (masked(crops, torch.tensor([[0.5, 0.25]]))[0, 0] == 1).float()
    assert float(kept.mean()) == pytest.approx(0.5 * 0.25 * 1.12**2, abs=0.03)


def test_boxes_overlap_by_a_share_of_the_smaller() -> None:
    one, two = np.zeros(2, np.float32), np.full(2, 10, np.float32)
    assert overlap(one, two, one, 2 * two) == 1
    assert overlap(one, two, one + 5, two) == pytest.approx(0.25)
    assert overlap(one, two, one + 20, two) == 0


@pytest.mark.parametrize(
    ("size", "seen"), [((256, 256), (64, 64)), ((256, 384), (64, 96)), ((96, 64), (96, 64))]
)
def test_pictures_of_any_size_are_seen_alike(size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert shrunk(torch.zeros(1, 3, *size), 64).shape[-2:] == seen


# ── weights ───────────────────────────────────────────────────────────────────────────────────────


def test_weights_come_back(tmp_path: Path, pictures: Tensor) -> None:
    torch.manual_seed(0)
    detector = Detector().eval()
    path = tmp_path / "detector.safetensors"
    detector.save(path)
    assert path.stat().st_size < 3 * 2**20
    again = Detector.load(path)
    one, other = (judge.features(pictures[:2]) for judge in (detector, again))
    assert torch.allclose(one, other, atol=0.02)


def test_weights_for_other_kinds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "detector.safetensors"
    Detector().save(path)
    monkeypatch.setattr(module, "_names", lambda: ["circle"])
    with pytest.raises(ValueError, match="train it again"):
        Detector.load(path)


def test_missing_weights_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.training\.judge"):
        Detector.load(tmp_path / "none.safetensors")


@needs_weights
def test_the_judges_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 4 * 10**6


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


@needs_weights
def test_the_trained_judge_reads_shapes(pictures: Tensor) -> None:
    readings = Detector.load().read(pictures)
    verdicts = [check(r, scene) for r, scene in zip(readings, shape_scenes(), strict=True)]
    assert sum(verdict.all for verdict in verdicts) >= len(verdicts) - 1


@needs_weights
def test_the_trained_judge_rejects_other_scenes(pictures: Tensor) -> None:
    readings = Detector.load().read(pictures)
    others = shape_scenes()[1:]
    assert not any(check(r, scene).kinds for r, scene in zip(readings, others, strict=False))


@needs_weights
def test_the_trained_judge_counts(atlas: Tensor) -> None:
    scenes = [Scene("white", (Thing("star", "red", count=n),)) for n in (2, 3, 4)]
    scenes.append(Scene("white"))
    readings = Detector.load().read(rendered(scenes, [1] * 4, atlas))
    assert [len(reading.things) for reading in readings] == [2, 3, 4, 0]


@needs_weights
def test_the_trained_judge_knows_left_from_right(atlas: Tensor) -> None:
    things = (Thing("star", "red"), Thing("circle", "blue"))
    scenes = [Scene("white", things, relation) for relation in ("left of", "right of", "above")]
    readings = Detector.load().read(rendered(scenes, [2] * 3, atlas))
    verdicts: list[Verdict] = [check(r, scene) for r, scene in zip(readings, scenes, strict=True)]
    assert all(verdict.positions for verdict in verdicts)
    swapped = replace(scenes[0], relation="right of")
    assert not check(readings[0], swapped).positions
