"""The published sizes, by their shapes alone: parameters, operations and memory; and that random
checkpoints become a bundle that draws.
"""

from __future__ import annotations

import pytest
import torch

from load_tests.full_size import forward_flops, shallow
from load_tests.random_checkpoints import random_like, write_checkpoints
from model.checkpoints.convert import import_bundle
from model.checkpoints.manifest import published
from model.checkpoints.memory import needs, shapes
from model.pipeline import Pipeline
from tests.conftest import micro_v1_config, write_merges

pytestmark = pytest.mark.heavy

PARAMETERS = {
    "paella-v3": {"denoiser": 1_008_350_592, "byt5": 2_614_091_264, "clip": 986_109_441},
    "paella-v1": {"denoiser": 577_995_184, "clip": 1_366_678_273},
}


@pytest.mark.parametrize("bundle", PARAMETERS)
def test_the_published_networks_count_their_published_parameters(bundle):
    parts = shapes(published().config(bundle))
    assert {name: parts[name].parameters for name in PARAMETERS[bundle]} == PARAMETERS[bundle]


@pytest.mark.parametrize(("bundle", "gflop"), [("paella-v3", 502), ("paella-v1", 125)])
def test_a_forward_pass_takes_the_operations_it_is_known_to_take(bundle, gflop):
    counts = forward_flops(published().config(bundle))
    assert counts["whole"] / 1e9 == pytest.approx(gflop, rel=0.01)
    assert 0.8 * counts["whole"] < counts["step"] < counts["whole"]


def test_where_the_encoders_are_decides_what_the_device_holds():
    parts = shapes(published().config("paella-v3"))
    device, cpu, int8 = (needs(parts)[place] for place in ("device", "cpu", "int8"))
    assert (
        device.device == cpu.device + cpu.cpu == 2 * sum(part.parameters for part in parts.values())
    )
    assert cpu.cpu == 2 * (parts["byt5"].parameters + parts["clip"].parameters)
    assert int8.device == device.device - parts["byt5"].parameters


def test_a_shallow_bundle_differs_from_the_published_one_in_its_encoders_depth_alone():
    whole, small = (
        shapes(config)
        for config in (published().config("paella-v3"), shallow(published().config("paella-v3")))
    )
    assert {name for name in whole if whole[name] != small[name]} == {"byt5", "clip"}


def test_random_checkpoints_become_a_bundle_that_draws(tmp_path):
    config, merges = micro_v1_config(), write_merges(tmp_path)
    write_checkpoints(config, tmp_path)
    sources = {name: tmp_path / f"{name}.pt" for name in config.networks}
    import_bundle(sources, config, tmp_path / "bundle", torch.bfloat16, merges)
    assert Pipeline.load(tmp_path / "bundle").generate(["red apple"], [0]).shape == (1, 32, 32, 3)


def test_random_values_keep_their_shape_and_counters_are_whole():
    values = torch.randn(8)
    assert random_like(torch.empty(3, 7, device="meta"), values).shape == (3, 7)
    assert (
        random_like(torch.empty((), dtype=torch.int64, device="meta"), values).dtype == torch.int64
    )
