"""A first step on nothing but noise, whose unconditional branch is an average computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import DENOISER, SamplingConfig
from model.image_request import Edit, ImageRequest, InputImage, Region, Repaint
from model.pipeline import Pipeline, Reader
from model.row_builder import RowBuilder

PROMPT, SIZE = "a red apple", (32, 32)


def averaging(bundle: Path) -> Pipeline:
    """Load a bundle whose recipe asks for it."""
    loaded = Pipeline.load(bundle).bundle
    recipe = replace(loaded.config.recipe, averaged_start=True)
    return Pipeline.of(replace(loaded, config=replace(loaded.config, recipe=recipe)))


@pytest.fixture
def asked(random_bundle: Path) -> Pipeline:
    return averaging(random_bundle)


def request(config: SamplingConfig, **fields: Any) -> ImageRequest:
    return ImageRequest(PROMPT, 7, *SIZE, config, **fields)


@torch.inference_mode()
def own_start(pipeline: Pipeline, noise: Tensor) -> Tensor:
    """Return the unconditional features of a row's own start tokens [H, W]."""
    denoiser: Any = pipeline.denoisers[DENOISER]
    (prompt,) = pipeline.encode([""])
    condition = pipeline.condition(prompt, reader=Reader(DENOISER))
    features: Tensor = denoiser.features(noise[None], denoiser.times(torch.ones(1)), condition)
    return features[0]


def guided(pipeline: Pipeline) -> SamplingConfig:
    return replace(pipeline.config.sampling(), guidance=(3.0, 2.0), guidance_steps=3, steps=3)


def test_known_features_in_place_of_a_branch_draw_the_same_image(
    asked: Pipeline, pipeline: Pipeline
) -> None:
    config = guided(asked)
    requests = [
        request(config),
        request(replace(config, guidance=(1.0, 1.0))),
        request(config, regions=(Region("a blue box", image([255] * 512 + [0] * 512)),)),
    ]
    for chosen in (requests, requests[:1], requests[2:]):
        plain, known = (RowBuilder(p).build(chosen) for p in (pipeline, asked))
        for row in known:
            assert (row.unconditional_start is None) == (not row.sampling.guided)
            if row.unconditional_start is not None:
                row.unconditional_start = own_start(asked, row.tokens)
        assert sum(len(row.branches) for row in known) < sum(len(row.branches) for row in plain)
        assert torch.equal(asked.denoise(known), pipeline.denoise(plain))


def test_only_the_first_step_has_a_branch_less(asked: Pipeline) -> None:
    (row,) = RowBuilder(asked).build([request(guided(asked))])
    counts = []
    while not row.done:
        counts.append(len(row.branches))
        asked.advance([row])
    assert counts == [1, 2, 2]


def test_the_average_is_that_of_the_features_of_several_noises(asked: Pipeline) -> None:
    config = guided(asked)
    starts = [asked.noise(seed, *SIZE, 3).start for seed in range(48)]
    expected = torch.stack([own_start(asked, start) for start in starts]).mean(0)
    found = asked.unconditional_start(asked.noise(0, *SIZE, 3), config, "")
    assert found is not None
    spread = (own_start(asked, starts[0]) - expected).norm()
    assert (found - expected).norm() < spread / 2


def test_the_average_is_computed_once_for_each_token_grid(
    asked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = []
    monkeypatch.setattr(
        asked, "_averaged_start", lambda name, grid, schedule: grids.append(grid) or torch.zeros(1)
    )
    for size in (SIZE, SIZE, (48, 32), SIZE, (32, 48)):
        asked.unconditional_start(asked.noise(0, *size, 3), guided(asked), "")
    assert grids == [(8, 8), (8, 12), (12, 8)]


def image(content: list[int], side: int = 32) -> InputImage:
    return InputImage(side, side, bytes(content), "digest")


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"negative_prompt": "a blue box"}, {}),
        ({}, {"deterministic": True}),
        ({}, {"guidance": (1.0, 1.0)}),
        ({"canvas": Edit(image([9] * 3072), strength=0.5)}, {}),
        ({"canvas": Repaint(image([9] * 3072), image([255] * 512 + [0] * 512))}, {}),
    ],
)
def test_other_rows_compute_both_branches(
    fields: dict[str, Any], changes: dict[str, Any], asked: Pipeline
) -> None:
    config = replace(guided(asked), **changes)
    (row,) = RowBuilder(asked).build([request(config, **fields)])
    assert row.known_unconditional is None
    assert len(row.branches) == (2 if config.guided else 1)


def test_recipes_do_not_ask_for_it_by_default(pipeline: Pipeline) -> None:
    noise = pipeline.noise(0, *SIZE, 3)
    assert pipeline.unconditional_start(noise, guided(pipeline), "") is None
    assert "averaged_start" in pipeline.config.recipe.unwritten


def test_scripts_draw_as_the_server_does(asked: Pipeline) -> None:
    config = guided(asked)
    rows = RowBuilder(asked).build([request(config)])
    width, height = SIZE
    tokens = asked.generate_tokens([PROMPT], [7], config, width=width, height=height)
    assert torch.equal(asked.denoise(rows), tokens)
