"""Blocks that are left out at random in training, and what is lost without each."""

from __future__ import annotations

import json
import sys
from copy import deepcopy

import pytest
import torch

from model.networks.blocks_v3 import AttentionBlock, ConvBlock
from model.networks.denoiser_v3 import Denoiser
from model.training import block_losses, denoiser, distill
from model.training.block_skips import removable, skip_at_random, without
from model.training.features import Examples
from tests.conftest import micro_config, randomise, write_random_bundle
from tests.support.short_training import run
from tests.support.small_training import art_of_our_own_fixture, corpus_file_fixture, small_config  # noqa: F401, fixtures
from tests.support.training_examples import examples, features

pytestmark = pytest.mark.training


@pytest.fixture
def network():
    own = Denoiser(micro_config().denoiser)
    randomise(own)
    return own


def test_blocks_that_add_are_removable_but_those_that_read_a_skip(network):
    found = removable(network)
    assert all(isinstance(block, ConvBlock | AttentionBlock) for block in found.values())
    every = [m for m in network.modules() if isinstance(m, ConvBlock | AttentionBlock)]
    others = [m for m in every if not any(m is block for block in found.values())]
    assert others == [network.up_blocks[1][0]]


def test_without_a_block_the_network_is_the_one_whose_block_adds_nothing(network):
    x = examples(4)
    whole = features(network, x)
    for name, block in removable(network).items():
        silent = deepcopy(network)
        own = silent.get_submodule(name)
        last = own.channelwise[4] if isinstance(own, ConvBlock) else own.attention.attn.out_proj
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        with without(block):
            left_out = features(network, x)
        torch.testing.assert_close(left_out, features(silent, x))
        assert not torch.allclose(left_out, whole)
    assert torch.equal(features(network, x), whole)


def test_in_training_each_row_s_blocks_are_left_out_by_chance_and_otherwise_none(network):
    x = examples(1)
    rows = Examples(*(getattr(x, f).expand(64, *getattr(x, f).shape[1:]) for f in x.__slots__[:6]))
    whole = features(network, x)
    assert torch.equal(whole, features(network, x))
    skip_at_random(network, 0.5)
    different = features(network, rows).flatten(1).unique(dim=0)
    assert len(different) > 20
    network.eval()
    assert torch.equal(features(network, x), whole)
    network.train()
    counts = []
    for block in removable(network).values():
        block.register_forward_hook(lambda _, i, o: counts.append((i[0] == o).all((1, 2, 3))))
    features(network, rows)
    assert torch.cat(counts).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_probability_zero_changes_nothing(network):
    x = examples(2)
    whole = features(network, x)
    skip_at_random(network, 0.0)
    assert torch.equal(features(network, x), whole)
    assert not any(block._forward_hooks for block in removable(network).values())


@pytest.mark.parametrize("trainer", [denoiser, distill])
def test_trainers_leave_blocks_out_of_the_student_alone(
    monkeypatch, tmp_path, corpus_file, prepared, trainer
):
    bundle = write_random_bundle(tmp_path / "random", small_config())
    common = [bundle, "--corpus", corpus_file, "--batch", 4]
    common += ["--guidance", "--updates", 2] if trainer is distill else ["--steps", 2]
    skipping = []

    def noted(network, probability):
        skipping.append((network, probability))
        skip_at_random(network, probability)

    monkeypatch.setattr("model.training.block_skips.skip_at_random", noted)
    plain = run(monkeypatch, trainer, tmp_path / "plain.pt", *common)
    torch.manual_seed(0)
    skipped = run(monkeypatch, trainer, tmp_path / "x.pt", *common, "--skip-blocks", 0.6)
    assert [probability for _, probability in skipping] == [0.0, 0.6]
    assert plain[0] != skipped[0]


def test_an_impossible_probability_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill", "tiny", "--guidance", "--skip-blocks", "1"])
    with pytest.raises(SystemExit):
        distill.main()
    assert "--skip-blocks" in capsys.readouterr().err


def test_losses_without_each_block_are_of_the_same_images(
    monkeypatch, capsys, tmp_path, corpus_file, prepared
):
    bundle = write_random_bundle(tmp_path / "random", small_config())
    arguments = [str(bundle), "--corpus", str(corpus_file), "--batches", "2", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["block_losses", *arguments, "--device", "cpu"])
    monkeypatch.setattr(block_losses, "without", lambda block: without(Nothing(block)))
    block_losses.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    own = Denoiser(small_config().denoiser)
    assert [row["block"] for row in result["blocks"]] == list(removable(own))
    assert all(row["more"] == 0 for row in result["blocks"])
    monkeypatch.setattr(block_losses, "without", without)
    block_losses.main()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    # A random codebook's codes lie so near each other that the last bit of a latent decides.
    assert again["loss"] == pytest.approx(result["loss"], rel=0.01)
    assert all(row["more"] != 0 for row in again["blocks"])


class Nothing(torch.nn.Module):
    """Stands in for a block: leaving this out leaves the block where it is."""

    def __init__(self, block):
        super().__init__()
