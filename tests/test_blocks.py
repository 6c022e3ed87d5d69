"""The table of blocks names each of them, and its times add up to those of a pass."""

from __future__ import annotations

import json

import pytest

from load_tests import blocks
from model.pipeline import Pipeline


def test_every_block_has_a_line_and_the_times_add_up(capsys, random_bundle):
    blocks.main([str(random_bundle), "--branches", "1", "2", "--passes", "5", "--threads", "1"])
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    result = json.loads(line)
    denoiser = Pipeline.load(random_bundle).bundle.denoiser
    names = [f"{side}_blocks" for side in ("down", "up")]
    expected = [
        f"{side}.{level}.{name}"
        for side in names
        for level, found in enumerate(getattr(denoiser, side))
        for name, _ in found.named_children()
    ]
    for branches in ("1", "2"):
        own = result["branches"][branches]
        found = [part["name"] for part in own["blocks"]]
        assert found == ["in_mapper, embedding", *expected, "clf", "out_mapper, drawing"]
        assert all(name in table for name in expected)
        kinds = {part["name"]: part["kind"] for part in own["blocks"]}
        assert kinds["down_blocks.0.0"] == "C"
        assert kinds["down_blocks.0.1"] == "T"
        assert kinds["down_blocks.1.0"] == "scale"
        assert {*kinds.values()} == {"input", "C", "T", "A", "scale", "output", "draw"}
        assert sum(own["kinds"].values()) == pytest.approx(
            sum(part["low"] for part in own["blocks"]), abs=0.01
        )
        assert 0 < own["pass_low_ms"] <= own["pass_ms"]
        assert all(part["low"] <= part["median"] for part in own["blocks"])


class Named:
    def __init__(self, kind):
        self.kind = kind


def test_time_between_blocks_is_the_t_block_s_there_or_the_next_one_s():
    order = [Named(kind) for kind in "CTCCT"]
    times = [0.0, 1.0, 3.0, 7.0, 8.0, 10.0, 11.0, 15.0]
    assert blocks.durations(order, times) == [1.0, 2.0, 4.0, 1.0, 3.0, 0.0, 4.0]


def test_nothing_measures_afterwards(random_bundle):
    step = blocks.Step.of(Pipeline.load(random_bundle), 1)
    blocks.measure(step, 1)
    denoiser = step.pipeline.bundle.denoiser
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in denoiser.modules())


def test_another_family_is_refused(capsys, random_v1_bundle):
    with pytest.raises(SystemExit):
        blocks.main([str(random_v1_bundle)])
    assert "no v3 denoiser" in capsys.readouterr().err
