"""The measure of the operations: what it reads in pictures that are known, and that it draws what
the server would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.image_request import Repaint
from model.pipeline import Pipeline
from model.training.art import shapes
from model.training.benchmark import rendered
from model.training.checker import Found, Reading
from model.training.repertoire import OPERATIONS, Stage, around, by_side, seam
from model.training.scenes import Scene, Thing
from model.training.studio import Studio
from server.engine.runner import Runner
from tests.conftest import emptied
from tests.support.judging import Guess, sprites_fixture  # noqa: F401, fixtures
from tests.support.operation_inputs import drawn, mask, picture
from tests.support.workers import job

STAR = Scene("blue", (Thing("star", "red"),))


@pytest.fixture
def studio(pipeline: Pipeline) -> Studio:
    return Studio(pipeline, steps=4)


@pytest.fixture
def stage(studio: Studio, sprites: Tensor) -> Stage:
    return Stage(studio, Guess(), sprites)


def test_the_mask_is_a_square_that_covers_the_thing_and_leaves_the_background():
    image = rendered([STAR], [0], shapes(64), (128, 128))[0].numpy()
    masked = around(image)
    rows, columns = (np.flatnonzero(masked.any(axis=axis)) for axis in (1, 0))
    assert abs(len(rows) - len(columns)) <= 2
    assert (np.abs(image[~masked].astype(int) - image[0, 0]).max(axis=-1) < 8).all()
    assert 0.1 < masked.mean() < 0.75


def test_a_seam_is_as_strong_as_the_step_across_it():
    kept = np.zeros((32, 32), dtype=np.bool_)
    kept[:, :16] = True
    flat = np.full((32, 32, 3), 200, dtype=np.uint8)
    assert seam(flat, kept) == 0
    assert seam(np.where(kept[..., None], flat, 40).astype(np.uint8), kept) > 40


def test_the_studio_draws_the_tokens_that_the_engine_draws(
    pipeline: Pipeline, runner: Runner, studio: Studio
):
    shown, where = picture(), mask(16, 32)
    pixels = np.frombuffer(bytearray(shown.content), np.uint8).reshape(32, 32, 3)
    masked = np.frombuffer(where.content, np.uint8).reshape(32, 32).astype(np.bool_)
    request = studio.inpainting("red apple", 0, pixels, masked)
    (row,) = studio.builder.build([replace(request, canvas=Repaint(shown, where))])
    while not row.done:
        pipeline.advance([row])
    (tokens,) = drawn(
        emptied(runner), job("a", sampling=studio.sampling, canvas=Repaint(shown, where))
    )
    assert torch.equal(row.tokens, tokens)


def test_things_are_taken_by_the_side_that_they_lie_on() -> None:
    left, right = (Found("star", "red", (x, 0.5), (0.3, 0.3), 1.0) for x in (0.2, 0.8))
    assert by_side(Reading("white", (right, left), (256, 256))) == [left, right]
    assert by_side(Reading("white", (right,), (256, 256))) == [None, right]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_figures(stage: Stage, operation: str) -> None:
    figures = OPERATIONS[operation](stage, 2)
    assert figures
    assert all(0 <= share <= 1 for share in figures.values())


def test_what_holds_whatever_the_weights_is_always_found(stage: Stage) -> None:
    first = OPERATIONS["inpaint"](stage, 2)
    assert first["outside_identical"] == 1
    assert OPERATIONS["inpaint"](stage, 2) == first
    assert OPERATIONS["interpolate"](stage, 2)["ends_match"] == 1
