"""Weights of the v1 family do what v3's do, as rows of the same engine: every operation, beside
rows of other kinds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.job import Job
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.settings import Settings
from tests.test_row_builder import EVERY_KIND
from tests.test_worker import job


@pytest.fixture(scope="module")
def v1(random_v1_bundle: Path) -> Runner:
    return Runner(Settings(weights=str(random_v1_bundle), device="cpu", dtype="float32"))


def asked(runner: Runner, id: str, **parts: object) -> Job:
    sampling = runner.pipelines["random-v1"].config.recipe.sampling(steps=4)
    return replace(job(id, model="random-v1", **parts), sampling=sampling)


def drawn(runner: Runner, *jobs: Job) -> dict[str, list[torch.Tensor]]:
    """Every image's tokens, by job."""
    runner.start([(each, range(len(each.seeds))) for each in jobs], Stopwatch())
    rows = [RowId(each.id, i) for each in jobs for i in range(len(each.seeds))]
    while left := [row for row in rows if not runner.rows[row].done]:
        runner.step("random-v1", left)
    return {
        each.id: [runner.rows[RowId(each.id, i)].tokens for i in range(len(each.seeds))]
        for each in jobs
    }


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_operation_draws_codes_that_exist_and_not_what_the_prompt_alone_would(v1, kind):
    wanted = asked(v1, kind, **EVERY_KIND[kind])
    own, plain = drawn(v1, wanted, asked(v1, "plain", seeds=wanted.seeds)).values()
    for tokens, without in zip(own, plain, strict=True):
        assert tokens.shape == without.shape == (16, 16)
        assert 0 <= tokens.min() <= tokens.max() < 64
    assert any((tokens != without).any() for tokens, without in zip(own, plain, strict=True))


def test_rows_of_all_operations_share_their_steps(v1):
    together = drawn(v1, *(asked(v1, kind, **parts) for kind, parts in EVERY_KIND.items()))
    for kind, parts in EVERY_KIND.items():
        alone = drawn(v1, asked(v1, kind, **parts))[kind]
        for tokens, own in zip(together[kind], alone, strict=True):
            assert (tokens == own).float().mean() >= 0.99


def test_regions_cost_v1_no_branches(v1):
    v1.start([(asked(v1, "regions", **EVERY_KIND["regions"]), range(1))], Stopwatch())
    assert len(v1.rows[RowId("regions", 0)].branches) == 2
