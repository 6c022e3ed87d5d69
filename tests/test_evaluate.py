"""The evaluation as a whole on random weights, with few prompts: every figure is there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from model.pipeline import Pipeline
from model.training import bench_report, benchmark, evaluate, judge_accuracy
from model.training.bench_report import Bench
from model.training.benchmark import Drawn
from model.training.contact_sheet import contact_sheet
from model.training.detector import Detector
from model.training.kinds import NAMES_OF_KINDS
from model.training.network_figures import networks
from model.training.recipe_text import RecipeError
from tests.support.judging import (
    Guess,
    sprites_fixture,  # noqa: F401, fixtures
)

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def bench(pipeline: Pipeline, sprites: Tensor) -> Bench:
    torch.manual_seed(0)
    source = Drawn(pipeline, pipeline.config.recipe.sampling(steps=1))
    return Bench(pipeline, source, sprites, Detector().eval(), Guess())


def test_the_bench_has_a_row_for_every_judge_and_every_check(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_report, "_QUICK", 2)
    monkeypatch.setattr(bench_report, "_ORACLE", 2)
    result = bench_report.paella_bench(bench, "tune", 1, quick=True)
    plain = json.loads(json.dumps(bench_report.bench_json(result)))
    rows = {"detector", "templates", "oracle, detector", "oracle, templates", "shuffled prompts"}
    assert set(plain["rows"]) == rows
    assert all(len(row) == 13 for row in plain["rows"].values())
    assert 0 <= plain["paella_bench"]["templates"] <= 1
    assert plain["kid_times_1000"]["mean"] > 0
    table = bench_report.bench_table(result, "title")
    assert table.row_count == 13 + 1 + 3


def test_a_small_bundle_is_refused_with_a_reason(pipeline: Pipeline) -> None:
    assert "needs 256" in str(evaluate.unfit(pipeline))


def test_presets_are_named_one_by_one_or_are_all_of_the_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(bundle)
    assert evaluate.presets_of(name, None) == [name]
    assert evaluate.presets_of(name, "all") == [f"{name}@quality"]
    assert evaluate.presets_of(name, "quality,fast") == [f"{name}@quality", f"{name}@fast"]
    with pytest.raises(RecipeError, match="exclude each other"):
        evaluate.presets_of(f"{name}@steps=4", "all")


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "changed"),
    [
        ("tiny", None, None, "tiny"),
        ("tiny", 4, None, "tiny@steps=4"),
        ("tiny@fast", 4, 1.5, "tiny@fast,steps=4,guidance=1.5"),
        ("tiny@steps=8", None, 0.0, "tiny@steps=8,guidance=0.0"),
    ],
)
def test_steps_and_guidance_of_the_command_line_are_changes_of_every_recipe(
    name: str, steps: int | None, guidance: float | None, changed: str
) -> None:
    assert evaluate.with_changes(name, steps, guidance) == changed


@pytest.mark.parametrize("what", ["--operations", "--curves=plots", "--contact-sheet=x.webp"])
def test_everything_is_drawn_by_the_changed_recipe(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(name: str, *_: object) -> Pipeline:
        raise RecipeError(name)

    monkeypatch.setattr(evaluate, "loaded", loaded)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--bundle", "tiny@fast", "--steps", "3", what])
    with pytest.raises(RecipeError, match="tiny@fast,steps=3"):
        evaluate.main()


@pytest.mark.parametrize("other", ["--curves=plots", "--judges", "--contact-sheet=sheet.webp"])
def test_several_presets_are_refused_where_one_is_judged(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--presets", "all", other])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--bundle BUNDLE@PRESET" in capsys.readouterr().err


def test_the_fastest_preset_near_the_best_has_the_fewest_branches() -> None:
    means = {"quality": (0.80, 24), "half": (0.79, 12), "fast": (0.785, 4), "poor": (0.7, 1)}
    measured = {
        name: {"paella_bench": {"detector": mean}, "branches": branches}
        for name, (mean, branches) in means.items()
    }
    assert evaluate.fastest(measured) == "fast"
    assert evaluate.fastest(measured, within=0.012) == "half"


def test_the_cost_of_an_image_counts_the_branches_of_its_guided_steps(pipeline: Pipeline) -> None:
    four = {"num_inference_steps": 4, "renoise_steps": 4, "guidance_steps": 3}
    guided = replace(pipeline.config.recipe, **four, guidance_scale=(2.0, 2.0))
    assert evaluate.cost(guided).branches == 7
    assert evaluate.cost(replace(guided, averaged_start=True)).branches == 6
    assert evaluate.cost(replace(guided, guidance_scale=(1.0, 1.0))).branches == 4


def test_time_decides_how_many_seeds() -> None:
    assert bench_report.seeds_within(600, 12, 1500) == 4
    assert bench_report.seeds_within(600, 6, 1500) == 2
    assert bench_report.seeds_within(-5, 6, 1500) == 1


def test_weak_kinds_are_drawn_again_with_fresh_seeds(bench: Bench) -> None:
    cases = benchmark.categories("tune", 2)["single_object"]
    sheet = bench.read(cases, [0], "single_object")
    again = bench_report.draw_again(bench, sheet)
    assert set(again) == {case.scene.things[0].kind for case in cases}
    assert all(0 <= share <= 1 for share in again.values())


def test_the_judges_are_judged_on_every_kind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    few = judge_accuracy._lone_scenes(1)[:4]
    assert [case.text for case in judge_accuracy._lone_scenes(2)] == list(NAMES_OF_KINDS) * 2
    monkeypatch.setattr(judge_accuracy, "_lone_scenes", lambda copies: few)
    result = judge_accuracy.judge_judges(bench, 1)
    assert result["n"] == 4
    assert result["templates, renders"]["kinds"] == 0.25
    assert result["templates, renders"]["confusions"]["circle → star"] == 1
    assert judge_accuracy.judges_table(result).row_count == 4


def test_the_other_networks_have_figures(pipeline: Pipeline, sprites: Tensor) -> None:
    figures = networks(pipeline, sprites, 16)
    assert 0 < figures["vqgan_psnr"] < 30
    assert 0 <= figures["clip_text_found"] <= 1


def test_a_contact_sheet_shows_every_prompt(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "sheet.webp"
    contact_sheet(pipeline, path, ["a red star", "a cat", "a blue ring"], columns=2)
    width, height = pipeline.config.native_size
    with Image.open(path) as sheet:
        assert sheet.size == (2 * (width + 12), 2 * (height + 40))
