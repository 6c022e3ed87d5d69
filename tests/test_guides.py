"""What guides the denoiser's training asks the right thing of the right place, and is not part of
what is kept."""

from __future__ import annotations

import pytest
import torch

from model.networks.denoiser_v3 import Denoiser
from model.training import guides
from model.training.guides import Guided
from tests.conftest import micro_config, randomise


def guided() -> Guided:
    torch.manual_seed(0)
    config = micro_config()
    denoiser = Denoiser(config.denoiser)
    randomise(denoiser)
    return Guided(denoiser, torch.randn(config.denoiser.num_labels, config.vqgan.c_latent))


def run(network: Guided, tokens: torch.Tensor) -> None:
    denoiser = network.denoiser
    byt5 = torch.randn(len(tokens), 3, denoiser.config.byt5_embd)
    denoiser.features(
        tokens, denoiser.times(torch.full((len(tokens),), 0.5)), denoiser.condition(byt5)
    )


def test_cells_hold_the_latents_of_their_own_tokens() -> None:
    network = guided()
    p = network.patch
    tokens = torch.randint(len(network.codebook), (2, 3 * p, 2 * p))
    patches = guides._cells(network.codebook[tokens], p)
    assert patches.shape == (2, 3, 2, p * p * network.codebook.shape[1])
    own = network.codebook[tokens[1, 2 * p : 3 * p, p : 2 * p]].flatten()
    assert torch.equal(patches[1, 2, 1], own)


def some_sprites(network: Guided, tokens: torch.Tensor) -> torch.Tensor:
    B, H, W = tokens.shape
    return torch.rand(B, 4, 4 * H, 4 * W)


@pytest.mark.parametrize("question", ["_PLACE", "_LATENTS", "_FINE_LATENTS", "_SPRITES"])
def test_each_question_alone_reaches_the_network_s_way_down(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PLACE", "_LATENTS", "_FINE_LATENTS", "_SPRITES"):
        monkeypatch.setattr(guides, name, float(name == question))
    network = guided()
    tokens = torch.randint(len(network.codebook), (2, 4 * network.patch, 4 * network.patch))
    run(network, tokens)
    more, figures = network.loss(tokens, some_sprites(network, tokens))
    assert figures.keys() == {"place", "latents", "fine", "sprites"}
    more.backward()
    gradient = next(network.denoiser.down_blocks.parameters()).grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.training
def test_the_same_features_learn_the_answers() -> None:
    network = guided()
    tokens = torch.randint(len(network.codebook), (2, 4 * network.patch, 4 * network.patch))
    sprites = some_sprites(network, tokens)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    figures = []
    for _ in range(60):
        run(network, tokens)
        more, shown = network.loss(tokens, sprites)
        optimizer.zero_grad()
        more.backward()
        optimizer.step()
        figures.append({name: float(value) for name, value in shown.items()})
    assert figures[-1]["place"] < 0.5 * figures[0]["place"]
    for name in ("latents", "fine", "sprites"):
        assert figures[-1][name] < 0.8 * figures[0][name]


def test_without_sprites_nothing_is_asked_about_them() -> None:
    network = guided()
    tokens = torch.randint(len(network.codebook), (1, 2 * network.patch, 2 * network.patch))
    run(network, tokens)
    more, figures = network.loss(tokens)
    assert "sprites" not in figures
    more.backward()
    assert network.sprites.weight.grad is None


def test_another_codebook_has_other_neighbours() -> None:
    network = guided()
    line = torch.arange(len(network.codebook)).float()[:, None].expand_as(network.codebook)
    network.use_codebook(line)
    assert torch.equal(network.codebook, line)
    assert set(network.neighbours.codes[5, :2].tolist()) == {4, 6}


def test_every_pass_is_asked_about_once() -> None:
    network = guided()
    tokens = torch.randint(len(network.codebook), (1, 2 * network.patch, 2 * network.patch))
    run(network, tokens)
    network.loss(tokens)
    with pytest.raises(RuntimeError, match="not been run"):
        network.loss(tokens)


def test_the_denoiser_s_own_state_stays_as_published() -> None:
    network = guided()
    assert (
        network.denoiser.state_dict().keys()
        == Denoiser(micro_config().denoiser).state_dict().keys()
    )
