"""Test what a plan decides: seeds, steps with guidance, sizes for CLIP, what is too much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import QUALITY, BundleConfig, find_bundle
from server.api.errors import ApiError
from server.api.images.admission import REFERENCE_SIDE
from server.api.planning.conditions import reference_size
from server.api.planning.draft import draft, seeds
from server.api.planning.sampling_choice import choose_sampling
from server.api.planning.work import Workload
from server.api.schemas import AnyFormat, GenerateRequest
from server.cli.offline import plan
from server.settings import Settings
from tests.conftest import micro_config, micro_preset_config


def test_a_drawn_seed_is_one_that_javascript_reads_exactly() -> None:
    drawn = {seed for _ in range(20) for seed in seeds(None, 1)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_seeds_follow_one_another_and_the_largest_int64_is_followed_by_the_smallest() -> None:
    assert seeds(5, 3) == (5, 6, 7)
    assert seeds(2**63 - 1, 2) == (2**63 - 1, -(2**63))


# In branches of a step for each pixel.
@pytest.mark.parametrize(
    ("output", "file"),
    [("png", 1), ("json", 1), ("url", 1), ("jpeg", 1), ("webp", 1), ("gif", 6)],
)
def test_a_result_costs_its_decoding_its_file_and_its_previews(
    output: AnyFormat, file: int
) -> None:
    config = BundleConfig.read(find_bundle("tiny"))
    models, settings = {config.name: config}, Settings()
    plain, streamed = (
        draft(request, "generate", models, settings, output).workload(None, 0)
        for request in (
            GenerateRequest(prompt="a ball", preset="quality"),
            GenerateRequest(prompt="a ball", preset="quality", stream=True, partial_images=2),
        )
    )
    assert (plain.output, plain.enlarging) == (3 + file, 2 + file)
    assert (streamed.output, streamed.enlarging) == (3 + file + 2 * (3 + 1), 2 + file)


@pytest.fixture(scope="module")
def guided_between() -> BundleConfig:
    """Weights whose recipe guides the second to the fourth of its six steps."""
    config = micro_config()
    return replace(config, recipe=replace(config.recipe, guidance_start=1, guidance_steps=3))


@pytest.mark.parametrize(
    ("fields", "first", "steps"),
    [
        ({}, 1, 3),
        ({"guidance_start": 0}, 0, 4),
        ({"guidance_start": 0.5}, 3, 1),
        ({"guidance_start": 0.5, "num_inference_steps": 12}, 6, 2),
        # After the recipe's last step with guidance.
        ({"guidance_start": 1}, 6, 0),
        ({"guidance_end": 0.5}, 1, 2),
        ({"guidance_end": 1}, 1, 5),
        ({"guidance_end": 1, "num_inference_steps": 12}, 2, 10),
    ],
)
def test_a_missing_end_of_the_guidance_is_the_recipe_s(
    guided_between: BundleConfig, fields: dict[str, Any], first: int, steps: int
) -> None:
    request = GenerateRequest(prompt="a ball", **fields)
    sampling = choose_sampling(request, guided_between, Settings())
    assert (sampling.guidance_start, sampling.guidance_steps) == (first, steps)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("preset", [None, "fast"])
def test_the_parameters_of_a_preset_whose_guidance_has_no_step_draw_its_image_again(
    tmp_path: Path, preset: str | None, first: int
) -> None:
    config = micro_preset_config(default=True)
    fast = config.presets["fast"]
    recipe = replace(fast.recipe, guidance_scale=(4.0, 4.0), guidance_start=first)
    config.with_preset("fast", replace(fast, recipe=recipe)).write(tmp_path)
    settings = Settings(weights=str(tmp_path))
    planned, _ = plan("generate", {"prompt": "a ball", "preset": preset}, settings)
    told = planned.parameters((), 0)
    assert (told["preset"], told["guidance_scale"]) == ("fast", [4, 4])
    for name in ("operation", "truncated"):
        del told[name]
    again, _ = plan("generate", told, settings)
    assert again.job.sampling == planned.job.sampling
    for param, value in (("guidance_scale", 4), ("guidance_steps", 1), ("guidance_end", 0.5)):
        asked = {"prompt": "a ball", "preset": preset, param: value}
        if preset is None:
            assert plan("generate", asked, settings)[0].job.sampling.preset == QUALITY
            continue
        with pytest.raises(ApiError) as refused:
            plan("generate", asked, settings)
        assert (refused.value.code, refused.value.param) == ("preset_conflict", param)


@pytest.mark.parametrize(
    ("stored", "needed"),
    [
        ((REFERENCE_SIDE, 10), (REFERENCE_SIDE, 10)),
        ((10, 20), (10, 20)),
        ((4 * REFERENCE_SIDE, REFERENCE_SIDE), (REFERENCE_SIDE, REFERENCE_SIDE // 4)),
        ((REFERENCE_SIDE, 4 * REFERENCE_SIDE), (REFERENCE_SIDE // 4, REFERENCE_SIDE)),
        ((10 * REFERENCE_SIDE, 1), (REFERENCE_SIDE, 1)),
        ((1, 10 * REFERENCE_SIDE), (1, REFERENCE_SIDE)),
    ],
)
def test_an_image_for_clip_is_scaled_down_to_a_longest_side(
    stored: tuple[int, int], needed: tuple[int, int]
) -> None:
    assert reference_size(stored) == needed


def test_too_much_work_is_told_with_its_parts() -> None:
    workload = Workload(images=2, steps=12, branches=2, output=4, enlarging=3, share=1.0)
    workload.check((64, 32), 0, 114688)
    with pytest.raises(ApiError) as full:
        workload.check((64, 32), 0, 114687)
    assert full.value.message == (
        "this request costs 114688, more than PAELLERA_MAX_REQUEST_WORK (114687)."
        " Cost = 2 images * 2048 pixels * (12 steps * 2 branches + 4)"
    )
    with pytest.raises(ApiError) as smaller:
        replace(workload, images=1, share=0.25).check((64, 32), 100, 1)
    assert smaller.value.message == (
        "this request costs 20780, more than PAELLERA_MAX_REQUEST_WORK (1)."
        " Cost = 1 image * (2048 pixels * (12 steps * 2 branches * 0.25 + 4)"
        " + 100 pixels * 3 to enlarge)"
    )
