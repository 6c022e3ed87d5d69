"""The judge of the operations: what it measures on pictures that are known, and that it draws what the server would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.pipeline import Pipeline
from model.training.repertoire import OPERATIONS, around, seam
from model.training.scenes import Scene, Thing, render
from model.training.studio import Studio
from server.engine.messages import Repaint
from server.engine.runner import Runner
from tests.conftest import emptied
from tests.test_row_builder import drawn, job, mask, picture

STAR = Scene("blue", (Thing("star", "red"),))


@pytest.fixture
def studio(pipeline: Pipeline) -> Studio:
    return Studio(pipeline, steps=4)


def test_the_mask_is_a_square_that_covers_the_thing_and_leaves_the_background():
    image = render(STAR, np.random.default_rng(0), 128, 128)
    masked = around(image)
    rows, columns = (np.flatnonzero(masked.any(axis=axis)) for axis in (1, 0))
    assert abs(len(rows) - len(columns)) <= 2
    assert (np.abs(image[~masked].astype(int) - image[0, 0]).max(axis=-1) < 8).all()
    assert 0.1 < masked.mean() < 0.6


def test_a_seam_is_as_strong_as_the_step_across_it():
    kept = np.zeros((32, 32), dtype=np.bool_)
    kept[:, :16] = True
    flat = np.full((32, 32, 3), 200, dtype=np.uint8)
    assert seam(flat, kept) == 0
    assert seam(np.where(kept[..., None], flat, 40).astype(np.uint8), kept) > 40


def test_the_studio_draws_the_tokens_that_the_engine_draws(pipeline: Pipeline, runner: Runner, studio: Studio):
    shown, where = picture(), mask(16, 32)
    pixels = np.frombuffer(bytearray(shown.content), np.uint8).reshape(32, 32, 3)
    masked = np.frombuffer(where.content, np.uint8).reshape(32, 32).astype(np.bool_)
    row = studio._repainting(studio.row("red apple", 0), pixels, masked)
    while not row.done:
        pipeline.advance([row])
    (tokens,) = drawn(emptied(runner), job("a", sampling=studio.sampling, canvas=Repaint(shown, where)))
    assert torch.equal(row.tokens, tokens)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_figures(studio: Studio, operation: str):
    figures = OPERATIONS[operation](studio, 2)
    assert figures
    assert all(0 <= share <= 1 for share in figures.values())


def test_what_holds_whatever_the_weights_is_always_found(studio: Studio):
    first = OPERATIONS["inpaint"](studio, 2)
    assert first["outside_identical"] == 1
    assert OPERATIONS["inpaint"](studio, 2) == first
    assert OPERATIONS["interpolate"](studio, 2)["ends_match"] == 1
