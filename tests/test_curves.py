"""The curves: which prompts, and that every recipe is a point of the plots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.pipeline import Pipeline
from model.training import curves
from model.training.detector import Detector
from model.training.scenes import SQUARE
from tests.support.judging import sprites_fixture  # noqa: F401, fixtures


def test_the_prompts_are_fixed_square_and_of_all_categories() -> None:
    cases = curves.fixed_prompts()
    assert sum(map(len, cases.values())) == curves.COUNT
    assert len(cases) == 11
    counts = [len(some) for some in cases.values()]
    assert max(counts) - min(counts) <= 1
    assert all(case.scene.aspect == SQUARE for some in cases.values() for case in some)
    texts = [case.text for some in cases.values() for case in some]
    assert len(set(texts)) == len(texts)
    assert cases == curves.fixed_prompts()


@pytest.mark.heavy
def test_every_recipe_is_measured_and_plotted(
    pipeline: Pipeline, sprites: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves, "GUIDANCES", (1.0, 2.0))
    monkeypatch.setattr(curves, "STEPS", (1, 2))
    torch.manual_seed(0)
    result = curves.measure(pipeline, Detector().eval(), sprites, tmp_path, 11)
    assert [point["guidance"] for point in result["guidance"]] == [1.0, 2.0]
    for name, guided in (("steps", True), ("unguided", False)):
        assert [point["steps"] for point in result[name]] == [1, 2]
        assert all((point["guidance"] != 1.0) is guided for point in result[name])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"guidance.svg", "steps.svg", "alignment_kid.svg"}
    assert all(path.stat().st_size < 60_000 for path in tmp_path.iterdir())
