"""The check of weights tells those that were trained from those that were not, and says what is
wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace

import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from model.checkpoints.check import PROMPTS, Findings, check
from model.config import find_bundle
from model.pipeline import Pipeline
from server.cli import app
from tests.conftest import randomise

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def trained() -> Findings:
    return check(Pipeline.load(find_bundle("tiny")))


@pytest.mark.judges_weights
def test_trained_weights_behave(trained):
    assert trained.problems == []
    assert trained.matched > trained.shuffled + 0.1


def test_the_check_draws_native_images_of_its_prompts(trained, native):
    width, height = native
    assert trained.images.shape == (len(PROMPTS), height, width, 3)
    assert 1 < trained.codes_used <= trained.codes


def use_changed_weights(pipeline: Pipeline) -> None:
    """What was folded and packed is a copy of the denoiser's weights."""
    pipeline.bundle.denoiser.fold()
    pipeline.bundle.denoiser.pack(*pipeline.grid(*pipeline.config.native_size))


def test_a_trained_bundle_whose_denoiser_was_not_does_not_behave():
    pipeline = Pipeline.load(find_bundle("tiny"))
    randomise(pipeline.bundle.denoiser)
    use_changed_weights(pipeline)
    assert any("do not show their prompts" in problem for problem in check(pipeline).problems)


def test_random_weights_do_not_behave_and_the_command_says_so(random_bundle, tmp_path):
    result = CliRunner().invoke(
        app,
        [
            "weights",
            "check",
            str(random_bundle),
            "--output",
            str(tmp_path / "sheet.png"),
            "--device",
            "cpu",
        ],
    )
    assert result.exit_code == 1
    assert "random fails the check: " in result.stderr
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 32, 2 * 32)


def test_random_v1_weights_do_not_behave_either(random_v1_bundle):
    assert check(Pipeline.load(random_v1_bundle)).problems


@pytest.mark.parametrize(
    ("network", "where"), [("denoiser", "denoiser"), ("vqgan", "VQGAN"), ("clip", "CLIP")]
)
def test_nan_is_found_where_it_is(random_bundle, network, where):
    pipeline = Pipeline.load(random_bundle)
    for parameter in getattr(pipeline.bundle, network).parameters():
        parameter.data.fill_(torch.nan)
    use_changed_weights(pipeline)
    assert any(where in problem for problem in check(pipeline).problems)


def test_blank_and_collapsed_pictures_are_said_to_be_that(trained):
    images, tokens = torch.full_like(trained.images, 7), torch.zeros_like(trained.tokens)
    flat = replace(trained, images=images, tokens=tokens, similarity=torch.eye(8))
    assert flat.problems == ["one code fills 100% of an image", "8 of the images are blank"]


def test_a_chance_is_the_share_of_assignments_that_fit_as_well(trained):
    assert replace(trained, similarity=torch.eye(8)).chance == pytest.approx(1 / 40320)
    assert replace(trained, similarity=torch.ones(8, 8)).chance == 1


def test_a_uniform_use_of_all_codes_is_that_many_bits(trained):
    assert replace(
        trained, tokens=torch.arange(trained.codes).view(1, 32, -1)
    ).entropy == pytest.approx(math.log2(trained.codes))
