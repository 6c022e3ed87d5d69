"""Recipes by command line: their texts, and their comparison on the same prompts and seeds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import BundleConfig, Recipe
from model.pipeline import Pipeline
from model.training import art, assemble, benchmark, curves, recipes
from model.training.detector import Detector
from model.training.recipe_text import RecipeError, changed
from tests.conftest import write_random_bundle
from tests.support.small_training import drawn_art, small_config

RECIPE = Recipe(
    num_inference_steps=12,
    renoise_steps=11,
    guidance_scale=(1.5, 1.5),
    guidance_steps=12,
    temperature=(0.5, 0.2),
)


def test_no_changes_are_none():
    assert changed(RECIPE, "") == RECIPE


def test_short_names_pairs_and_shares():
    recipe = changed(RECIPE, "steps=4,guidance=1,temperature=0.7:0.3,renoise_order=halton")
    assert recipe == replace(
        RECIPE,
        num_inference_steps=4,
        renoise_steps=4,
        guidance_scale=(1.0, 1.0),
        guidance_steps=4,
        temperature=(0.7, 0.3),
        renoise_order="halton",
    )
    assert not recipe.sampling().guided


def test_named_step_counts_are_taken_as_they_are():
    recipe = changed(RECIPE, "steps=8,renoise_steps=2,guidance_steps=3,guidance_start=1")
    counts = recipe.renoise_steps, recipe.guidance_steps, recipe.guidance_start
    assert counts == (2, 3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps=4", "NAME of .*steps"),
        ("steps", "NAME=VALUE"),
        ("steps=four", "steps must be a number"),
        ("steps=100", "num_inference_steps"),
        ("guidance=a", "guidance_scale"),
        ("renoise_order=up", "renoise_order"),
        ("guidance_start=9", "guidance_start"),
    ],
)
def test_what_is_no_change_is_refused_by_name(text, message):
    with pytest.raises(RecipeError, match=message):
        changed(RECIPE, text)


@pytest.fixture
def bundle(tmp_path, prepared):
    return write_random_bundle(tmp_path / "random", small_config())


def test_a_bundle_with_changes_draws_by_the_changed_recipe(bundle):
    pipeline = recipes.loaded(
        f"{bundle}@steps=2,guidance=1,prior_steps=3", torch.device("cpu"), torch.float32
    )
    assert pipeline.config.recipe.sampling().steps == 2
    assert pipeline.prior_noise(pipeline.prior_settings())[0] == 4
    branches = []
    advance = type(pipeline).advance

    def watched(rows):
        branches.append([len(row.branches) for row in rows])
        advance(pipeline, rows)

    pipeline.advance = watched
    pipeline.generate(["a red circle"], [0])
    assert branches == [[1], [1]]


def test_differences_are_paired_by_prompt(bundle):
    pipeline = recipes.loaded(str(bundle), torch.device("cpu"), torch.float32)
    first = np.array([[True], [False], [True], [False]] * 50)
    better = first.copy()
    better[1] = True
    own, others = ({"counting": each[:100], "position": each[100:]} for each in (better, first))
    found = recipes.compared("x", pipeline, own, others)
    assert (found.score, found.difference) == (0.505, 0.005)
    # Unpaired, the interval would be as wide as that of the score.
    assert 0 <= found.difference_low <= 0.005 <= found.difference_high <= 0.02
    assert found.high - found.low > 0.1
    assert found.categories == {"counting": 0.51, "position": 0.5}


@pytest.mark.heavy
def test_the_comparison_ends_with_a_line_of_json(bundle, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(art, "atlas", drawn_art)
    monkeypatch.setattr(recipes, "atlas", drawn_art)
    monkeypatch.setattr(Detector, "load", lambda path, device: Detector().eval())
    monkeypatch.setattr(benchmark, "_KID_SIZE", 8)
    monkeypatch.setattr(curves, "_TIMED", 1)
    names = [f"{bundle}@steps=1", f"{bundle}@steps=2,renoise_order=confidence"]
    fixed = ["--count", "11", "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["recipes", *names, *fixed])
    recipes.main()
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert [row["recipe"] for row in result["recipes"]] == names
    square = set(benchmark.CRITERIA) - {"three_two", benchmark.CONTROL}
    assert all(set(row["categories"]) == square for row in result["recipes"])
    assert "two objects" in printed
    assert [row["sampling"]["steps"] for row in result["recipes"]] == [1, 2]
    assert result["recipes"][0]["difference"] == 0
    assert result["prompts"] == 11
    assert all(row["milliseconds"] > 0 for row in result["recipes"])


def test_a_recipe_that_is_none_ends_with_a_message(bundle, monkeypatch):
    monkeypatch.setattr(recipes, "atlas", drawn_art)
    monkeypatch.setattr(Detector, "load", lambda path, device: Detector().eval())
    monkeypatch.setattr(
        sys, "argv", ["recipes", f"{bundle}@step=1", "--count", "11", "--device", "cpu"]
    )
    with pytest.raises(RecipeError, match="step"):
        recipes.main()


def test_every_recipe_is_read_before_the_first_is_measured(bundle, monkeypatch):
    monkeypatch.setattr(recipes, "hits", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["recipes", str(bundle), f"{bundle}@step=1"])
    with pytest.raises(RecipeError, match="step"):
        recipes.main()


def test_a_bundle_with_another_denoiser_may_have_another_recipe(
    bundle, monkeypatch, tmp_path, capsys
):
    base = assemble.load_v3(bundle, torch.device("cpu"), torch.float32)
    weights = {f"denoiser.{name}": t for name, t in base.denoiser.state_dict().items()}
    torch.save({"ema": weights}, tmp_path / "x.pt")
    arguments = ["--base", str(bundle), "--denoiser", str(tmp_path / "x.pt")]
    out = tmp_path / "fast"
    monkeypatch.setattr(
        sys, "argv", ["assemble", str(out), *arguments, "--recipe", "steps=4,guidance=1"]
    )
    assemble.main()
    recipe = BundleConfig.read(out).recipe
    assert recipe == changed(base.config.recipe, "steps=4,guidance=1")
    assert not recipe.sampling().guided
    monkeypatch.setattr(sys, "argv", ["assemble", str(out), *arguments, "--recipe", "step=4"])
    with pytest.raises(SystemExit):
        assemble.main()
    assert "NAME=VALUE" in capsys.readouterr().err


def test_a_preset_is_measured_as_if_it_were_the_only_one(preset_bundle):
    device, dtype = torch.device("cpu"), torch.float32
    fast = recipes.loaded(f"{preset_bundle}@fast", device, dtype)
    assert fast.config.recipe.num_inference_steps == 3
    both = Pipeline.load(preset_bundle)
    expected = both.generate_tokens(["red apple"], [1], both.config.sampling("fast"))
    tokens = fast.generate_tokens(["red apple"], [1], fast.config.recipe.sampling())
    assert torch.equal(tokens, expected)
    changed_too = recipes.loaded(f"{preset_bundle}@fast,steps=1", device, dtype)
    assert changed_too.config.recipe.num_inference_steps == 1
    plain = recipes.loaded(str(preset_bundle), device, dtype)
    assert plain.config.recipe == both.config.recipe
    with pytest.raises(RecipeError, match="has quality, fast, not 'best'"):
        recipes.loaded(f"{preset_bundle}@best", device, dtype)
