"""Two optimizers as one: every parameter is stepped once, at the same rate, and their state
survives a checkpoint."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from model.networks.denoiser_v3 import Denoiser
from model.training.denoiser import draw_times, matrices_of
from model.training.optimizers import Optimizers
from tests.conftest import micro_config


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def step(module: nn.Module, optimizers: Optimizers, seed: int = 0) -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    optimizers.zero_grad()
    (module(x) - x[:, :4]).square().mean().backward()
    optimizers.step()


def moved(module: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (p - before[name]).detach() for name, p in module.named_parameters()}


def test_every_parameter_is_stepped(prepared):
    module = network()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    step(module, Optimizers(module, 1e-3, ["0.weight"]))
    assert all(change.abs().max() > 0 for change in moved(module, before).values())


def test_a_matrix_is_stepped_in_all_its_directions_alike(prepared):
    module = network()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    step(module, Optimizers(module, 1e-3, ["0.weight"]))
    by_muon, by_adamw = (moved(module, before)[name] for name in ("0.weight", "2.weight"))
    singular = torch.linalg.svdvals(by_muon)
    assert singular.min() > 0.5 * singular.max()
    assert torch.allclose(
        by_adamw.abs(), torch.tensor(1e-3), rtol=0.02
    )  # whose first step goes as far in every entry


def test_the_rate_is_that_of_all_parts(prepared):
    optimizers = Optimizers(network(), 1e-3, ["0.weight"])
    optimizers.lr = 2e-4
    assert optimizers.lr == 2e-4
    assert [group["lr"] for part in optimizers.parts.values() for group in part.param_groups] == [
        2e-4,
        2e-4,
    ]


def test_a_restored_state_steps_as_the_one_that_was_saved(prepared):
    module, twin = network(), network()
    optimizers, restored = (Optimizers(m, 1e-2, ["0.weight", "2.weight"]) for m in (module, twin))
    step(module, optimizers)
    twin.load_state_dict(module.state_dict())
    restored.load_state_dict(
        deepcopy(optimizers.state_dict())
    )  # which would else share its tensors
    for m, o in ((module, optimizers), (twin, restored)):
        step(m, o, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True)
    )


def test_the_state_of_other_optimizers_is_refused(prepared):
    with pytest.raises(KeyError, match="muon"):
        Optimizers(network(), 1e-3, ["0.weight"]).load_state_dict(
            Optimizers(network(), 1e-3).state_dict()
        )


def test_muon_gets_the_blocks_matrices_and_neither_embeddings_nor_what_reads_a_condition(prepared):
    denoiser = Denoiser(micro_config().denoiser)
    names = matrices_of(denoiser)
    assert "down_blocks.0.0.channelwise.0.weight" in names
    assert not [name for name in names if "mapper" in name or "bias" in name or "clf" in name]
    assert all(denoiser.get_parameter(name).ndim == 2 for name in names)


def test_early_times_are_more_and_all_lie_above_zero():
    even, early = (draw_times(20_000, torch.device("cpu"), power) for power in (1.0, 1.5))
    assert even.mean().item() == pytest.approx(0.5, abs=0.02)
    assert early.mean().item() == pytest.approx(0.6, abs=0.02)  # 1 − E[u^1.5] = 1 − 1 / 2.5
    assert early.min() > 0
    assert early.max() <= 1
