"""What operations mean in tokens: kept ones stay, edited ones return to noise as far as asked,
regions count where they lie.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.pipeline import Pipeline
from model.rows import (
    PinnedTokens,
    RegionBranch,
    Row,
    edit,
    generate,
    refine,
    repaint,
    token_mask,
    token_weight,
)
from tests.support.pipeline_rows import PLAIN, PROMPTS, agreement, row, run

GRID = (8, 8)


@pytest.fixture
def picture() -> Tensor:
    return torch.randint(64, GRID, generator=torch.Generator().manual_seed(3))


def left_half() -> Tensor:
    return torch.arange(GRID[1]).expand(GRID) < GRID[1] // 2


def with_regions(pipeline: Pipeline, *regions: tuple[str, Tensor], prompt: str = PROMPTS[0]) -> Row:
    made = [RegionBranch(row(pipeline, text).conditional, weight) for text, weight in regions]
    base = row(pipeline, prompt)
    return generate(PLAIN, base.noise, base.conditional, base.unconditional, regions=made)


# ── previews ──────────────────────────────────────────────────────────────────────────────────────


def test_a_preview_shows_the_latest_draw_without_what_became_noise_again(pipeline):
    renoised, kept = row(pipeline), row(pipeline, config=replace(PLAIN, renoise_steps=0))
    assert torch.equal(renoised.clean, renoised.noise.start)
    pipeline.advance([renoised, kept])
    assert agreement(renoised.tokens, kept.tokens) < 1
    assert torch.equal(renoised.clean, kept.tokens)
    (final,) = run(pipeline, renoised)
    assert torch.equal(renoised.clean, final)


# ── inpainting and outpainting ────────────────────────────────────────────────────────────────────


def test_what_is_kept_is_there_after_every_step_and_the_rest_is_painted(pipeline, picture):
    keep = left_half()
    mine = repaint(row(pipeline), PinnedTokens(picture, keep))
    while not mine.done:
        assert torch.equal(mine.tokens[keep], picture[keep])
        pipeline.advance([mine])
    assert torch.equal(mine.tokens[keep], picture[keep])
    assert agreement(mine.tokens[~keep], picture[~keep]) < 0.5


def test_the_rest_is_painted_in_sight_of_what_is_kept(pipeline, picture):
    keep = left_half()
    one, other = (
        repaint(row(pipeline), PinnedTokens(tokens, keep)) for tokens in (picture, 63 - picture)
    )
    assert not torch.equal(*(tokens[~keep] for tokens in run(pipeline, one, other)))


def test_keeping_nothing_is_generating(pipeline, picture):
    nothing = PinnedTokens(picture, torch.zeros(GRID, dtype=torch.bool))
    assert torch.equal(
        run(pipeline, repaint(row(pipeline), nothing))[0], run(pipeline, row(pipeline))[0]
    )


def test_keeping_everything_returns_the_picture(pipeline, picture):
    everything = PinnedTokens(picture, torch.ones(GRID, dtype=torch.bool))
    assert torch.equal(run(pipeline, repaint(row(pipeline), everything))[0], picture)


def test_a_kept_picture_changes_nothing_for_its_neighbours(pipeline, picture):
    (alone,) = run(pipeline, row(pipeline))
    among, _ = run(
        pipeline, row(pipeline), repaint(row(pipeline, seed=4), PinnedTokens(picture, left_half()))
    )
    assert agreement(among, alone) >= 0.99


@pytest.mark.parametrize(("y", "x"), [(0, 0), (7, 7), (3, 4), (8, 15)])
def test_a_token_is_repainted_if_a_single_pixel_of_it_is_masked(y, x):
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[y, x] = True
    tokens = token_mask(mask, 4)
    assert tokens.shape == (4, 8)
    assert tokens.nonzero().tolist() == [[y // 4, x // 4]]


# ── editing ───────────────────────────────────────────────────────────────────────────────────────


def test_an_edit_of_strength_zero_is_the_picture_and_takes_no_step(pipeline, picture):
    mine = edit(row(pipeline), picture, 0.0)
    assert mine.done
    assert torch.equal(mine.tokens, picture)


def test_an_edit_of_strength_one_ignores_the_picture(pipeline, picture):
    assert torch.equal(
        run(pipeline, edit(row(pipeline), picture, 1.0))[0], run(pipeline, row(pipeline))[0]
    )


def wide_row(pipeline: Pipeline) -> Row:
    """Return a new row of 64 x 64 tokens and twelve steps."""
    config = replace(PLAIN, steps=12, renoise_steps=11)
    base = row(pipeline, config=config)
    return generate(config, pipeline.noise(0, 256, 256, 12), base.conditional, base.unconditional)


@pytest.mark.parametrize("strength", [1 / 12, 0.25, 0.5, 0.75, 11 / 12])
def test_an_edit_begins_where_as_much_is_noise_as_its_strength_says(pipeline, strength):
    picture = torch.full((64, 64), 5)
    mine = edit(wide_row(pipeline), picture, strength)
    assert mine.step == 12 - round(12 * strength)
    assert 1 - agreement(mine.tokens, picture) == pytest.approx(
        strength * 63 / 64, abs=0.04
    )  # 4,096 tokens, 5 standard deviations


def test_what_an_edit_returns_to_noise_is_the_seeds_own(pipeline, picture):
    mine, other = edit(row(pipeline), picture, 0.5), edit(row(pipeline), picture, 0.5)
    noised = mine.tokens != picture
    assert torch.equal(mine.tokens, other.tokens)
    assert torch.equal(mine.tokens[noised], mine.noise.start[noised])
    assert not torch.equal(edit(row(pipeline, seed=1), picture, 0.5).tokens, mine.tokens)


def test_refining_with_a_strength_of_one_keeps_nothing(pipeline, picture):
    mine = refine(row(pipeline), picture, 1.0)
    assert mine.pinned is None
    assert torch.equal(run(pipeline, mine)[0], run(pipeline, row(pipeline))[0])


@pytest.mark.parametrize("strength", [1 / 12, 0.25, 0.75, 11 / 12])
def test_a_refined_row_keeps_every_token_that_is_not_noised(pipeline, strength):
    picture = torch.full((64, 64), 5)
    mine = refine(wide_row(pipeline), picture, strength)
    assert mine.pinned is not None
    assert torch.equal(mine.pinned.tokens, picture)
    noised = mine.tokens != picture
    assert not (mine.pinned.keep & noised).any()
    # Of 64 codes the noise hits the image's own code once in a while.
    assert (mine.pinned.keep | noised).float().mean() > 0.96
    assert 1 - mine.pinned.keep.float().mean() == pytest.approx(strength, abs=0.04)


@pytest.mark.parametrize(
    ("strength", "uniform", "kept"),
    [(0.5, 0.5 - 2**-25, False), (0.5, 0.5, False), (0.5, 0.5 + 2**-24, True), (0.0, 0.0, True)],
)
def test_a_token_is_redrawn_up_to_the_very_share_of_noise(
    pipeline, picture, strength, uniform, kept
):
    mine = row(pipeline)
    assert mine.times[3] == 0.5
    mine.noise = replace(mine.noise, renoise=torch.full_like(mine.noise.renoise, uniform))
    refine(mine, picture, strength)
    assert mine.pinned is not None
    assert torch.equal(mine.pinned.keep, torch.full(GRID, kept))
    assert torch.equal(mine.tokens, picture if kept else mine.noise.start)


# ── regions ───────────────────────────────────────────────────────────────────────────────────────


def test_a_region_that_covers_everything_is_its_prompt(pipeline):
    (expected,) = run(pipeline, row(pipeline, PROMPTS[2]))
    (drawn,) = run(pipeline, with_regions(pipeline, (PROMPTS[2], torch.ones(GRID))))
    assert agreement(drawn, expected) >= 0.99


def test_a_region_without_weight_is_not_there(pipeline):
    (expected,) = run(pipeline, row(pipeline))
    (drawn,) = run(pipeline, with_regions(pipeline, (PROMPTS[2], torch.zeros(GRID))))
    assert agreement(drawn, expected) >= 0.99


def test_each_side_is_drawn_by_its_own_prompt(pipeline):
    left = left_half()
    config = replace(PLAIN, steps=1, renoise_steps=0, sampler="argmax")
    sides = [
        run(pipeline, row(pipeline, prompt, config=config))[0]
        for prompt in (PROMPTS[0], PROMPTS[2])
    ]
    mixed = with_regions(pipeline, (PROMPTS[2], (~left).float()))
    mixed.sampling = config
    (drawn,) = run(pipeline, mixed)
    assert agreement(drawn[left], sides[0][left]) >= 0.99
    assert agreement(drawn[~left], sides[1][~left]) >= 0.99


def test_regions_that_overlap_share_and_the_prompt_has_the_rest(pipeline):
    weights = torch.full(GRID, 0.25), torch.ones(GRID), torch.zeros(GRID)
    coverage = with_regions(pipeline, *zip(PROMPTS, weights, strict=False)).coverage
    assert coverage is not None
    assert torch.allclose(coverage[:4, 0, 0], torch.tensor([0.0, 0.2, 0.8, 0.0]))
    assert torch.equal(coverage[4], torch.ones(GRID))


def test_regions_that_leave_something_leave_it_to_the_prompt(pipeline):
    coverage = with_regions(
        pipeline, *((prompt, torch.full(GRID, 0.25)) for prompt in PROMPTS[1:3])
    ).coverage
    assert coverage is not None
    assert torch.allclose(coverage[:3, 0, 0], torch.tensor([0.5, 0.25, 0.25]))


def test_rows_with_regions_and_rows_without_share_steps(pipeline):
    (alone,) = run(pipeline, row(pipeline))
    regional = with_regions(
        pipeline, (PROMPTS[2], left_half().float()), (PROMPTS[3], 1 - left_half().float())
    )
    (expected,) = run(
        pipeline,
        with_regions(
            pipeline, (PROMPTS[2], left_half().float()), (PROMPTS[3], 1 - left_half().float())
        ),
    )
    plain, mixed = run(pipeline, row(pipeline), regional)
    assert agreement(plain, alone) >= 0.99
    assert agreement(mixed, expected) >= 0.99


def test_a_region_costs_one_more_branch(pipeline):
    assert len(with_regions(pipeline, (PROMPTS[2], torch.ones(GRID))).branches) == 1 + len(
        row(pipeline).branches
    )


def test_a_region_weighs_in_a_token_what_it_weighs_in_its_pixels():
    weight = torch.zeros(8, 8)
    weight[:, :6] = 1
    assert token_weight(weight, 4).tolist() == [[1.0, 0.5], [1.0, 0.5]]
