"""Alignment by reward: groups, advantages and ratios are what they are called, a toy's reward
rises, and an interrupted run ends as one that was not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import find_bundle
from model.pipeline import Pipeline
from model.training import benchmark, loop, reward, rollouts
from model.training.checker import Found, Reading
from model.training.distill import starting_network
from model.training.distillation import Student, Teacher
from model.training.judged import log_probability
from model.training.prompts import BenchPrompt
from model.training.recipe_text import RecipeError
from model.training.rollouts import Case, Plan, Rollouts, advantages, stratified_times
from model.training.scenes import Scene, Thing
from tests.support.checkpoints import identical, without_clock
from tests.support.short_training import Crash, run

pytestmark = pytest.mark.training

FEW = 16  # codes of 64 that the toy's reward is for


class Toy:
    """A reward that is the share of the first few codes. means: of every rollout."""

    def __init__(self):
        self.means, self.cases, self.tokens = [], [], []

    def __call__(self, pipeline, tokens, cases):
        shares = (tokens < FEW).float().mean((1, 2))
        self.means.append(shares.mean().item())
        self.cases.append(cases)
        self.tokens.append(tokens)
        return shares


@pytest.fixture
def toy(monkeypatch):
    own = Toy()
    monkeypatch.setattr(reward, "judged_by", lambda judge: own)
    monkeypatch.setattr(reward.Detector, "load", lambda path, device: None)
    return own


SMALL = ["--prompts", 4, "--images", 4, "--times", 2, "--batch", 8]


def made(path, toy, plan=None):
    """Return a student, the network it begins as, and rollouts of a bundle of random weights."""
    pipeline = Pipeline.load(path)
    network = starting_network(pipeline.bundle, None, torch.device("cpu"))
    student = Student(network)
    config = pipeline.config.recipe.sampling(guidance=(1.0, 1.0), steps=4)
    start = replace(Teacher.of(network, pipeline.bundle, config, torch.float32), nothing=None)

    def old(states):
        features = reward.policy_features(student, states, start.attention_weights)
        return reward.mean_log_probability(student, features, states)

    own = Rollouts(
        pipeline.bundle,
        network,
        reward.reward_cases(),
        config,
        plan or Plan(prompts=3, images=4, times=2, batch=8, seed=0),
        reward=toy,
        log_probability=old,
        dtype=torch.float32,
    )
    return student, start, own


# ── groups and states ─────────────────────────────────────────────────────────────────────────────


def test_advantages_are_clipped_deviations_of_the_group():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.1]])
    found = advantages(torch.cat([rewards, rewards + 5]))
    assert found[0].tolist() == [-1, -1, 1, 1]
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[2, 3].item() == pytest.approx(3**0.5)
    torch.testing.assert_close(found[3:], found[:3], atol=1e-4, rtol=1e-4)
    assert advantages(torch.eye(8)[:1]).max() == 2.0


def test_times_are_the_sampler_s_and_each_image_has_one_of_every_stretch():
    times = stratified_times(2, 500, 4, torch.device("cpu"))
    assert {*times[0].tolist()} == {1.0, 0.75}
    assert {*times[1].tolist()} == {0.5, 0.25}
    assert {*stratified_times(3, 500, 2, torch.device("cpu")).flatten().tolist()} == {1.0, 0.5}


def test_prompts_are_of_the_reward_set_without_the_unseen_pairs():
    cases = reward.reward_cases()
    texts = {case.prompt.text for case in cases}
    for name, own in benchmark.categories("reward").items():
        assert texts.isdisjoint(p.text for p in own) == (name == "unseen_combinations")
    for other in ("tune", "report"):
        for own in benchmark.categories(other).values():
            assert texts.isdisjoint(prompt.text for prompt in own)


def test_an_epoch_has_every_prompt_and_processes_share_it(random_bundle, toy, monkeypatch):
    *_, own = made(random_bundle, toy, Plan(prompts=16, images=2, times=1, batch=8, seed=0))
    total = sum(len(some) // 16 for some in own._cases)
    chunks = [own.cases_of(number) for number in range(total)]
    texts = [case.prompt.text for chunk in chunks for case in chunk]
    assert len({*texts}) == len(texts) >= len(reward.reward_cases()) - 3 * 16
    assert all(len({case.prompt.scene.aspect for case in chunk}) == 1 for chunk in chunks)
    assert own.cases_of(total) != chunks[0]
    numbers = []
    for rank in (0, 1):
        monkeypatch.setattr(rollouts, "world", lambda: 2)
        monkeypatch.setattr(rollouts, "rank", lambda own=rank: own)
        numbers.append(own._number)
    assert numbers == [0, 1]


def test_images_are_drawn_in_few_steps_without_guidance_by_seeds_of_their_own(
    random_bundle, toy, monkeypatch
):
    _, _, own = made(random_bundle, toy)
    seeds, branches = [], []
    noise, advance = Pipeline.noise, Pipeline.advance

    def watched(self, seed, *rest):
        seeds.append(seed)
        return noise(self, seed, *rest)

    def stepped(self, rows):
        branches.append([len(row.branches) for row in rows])
        advance(self, rows)

    monkeypatch.setattr(Pipeline, "noise", watched)
    monkeypatch.setattr(Pipeline, "advance", stepped)
    for _ in range(own.steps + 1):
        own.advance()
    assert len(toy.means) == 2
    assert len({*seeds}) == 24
    assert min(seeds) >= 1_000_000
    assert branches == [[1] * 12] * 8
    for cases in toy.cases:
        assert [cases[i] for i in range(0, 12, 4)] == cases[:1] + cases[4:5] + cases[8:9]
        assert all(cases[i] == cases[i - i % 4] for i in range(12))


def test_a_rollout_is_drawn_with_the_weights_of_then(random_bundle, toy):
    student, _, own = made(random_bundle, toy)
    own.cases_of = lambda number: reward.reward_cases()[:3]
    own.advance()
    with torch.no_grad():
        student.denoiser.out_mapper[1].weight[:FEW] += (
            5 * student.denoiser.out_mapper[1].weight[:FEW]
        )
    for _ in range(own.steps):
        own.advance()
    assert not torch.equal(*toy.tokens)


def test_states_are_the_image_s_tokens_noised_at_their_time(random_bundle, toy):
    _, _, own = made(random_bundle, toy)
    seen = []
    for _ in range(own.steps):
        own.advance()
        seen.append(own.current)
    assert [len(states.t) for states in seen] == [8, 8, 8]
    tokens = torch.cat([states.tokens for states in seen])
    assert all((tokens == image).all((1, 2)).sum() == 2 for image in toy.tokens[0])
    for states in seen:
        changed = (states.noisy != states.tokens).float().mean((1, 2))
        assert (changed <= states.t + 0.25).all()
        assert (changed >= states.t - 0.3).all()
    r = own._rollout
    one = r.states(torch.tensor([5, 12 + 5]))
    assert torch.equal(one.tokens[0], one.tokens[1])
    assert torch.equal(one.inputs.byt5[0], r.byt5[1])
    assert torch.equal(one.inputs.clip_image[0], r.clip_image[5])
    assert torch.equal(one.advantages, r.advantages[[5, 5]])


# ── the reward ────────────────────────────────────────────────────────────────────────────────────


def test_the_score_is_half_the_criterion_and_half_the_words():
    scene = Scene("white", (Thing("circle", "red"),))
    case = Case("shape_colour", BenchPrompt("a red circle", scene))
    circle = Found("circle", "red", (0.5, 0.5), (0.5, 0.5), 0.9)
    right = Reading("white", (circle,), (256, 256))
    assert reward.score(right, case) == 1
    elsewhere = replace(right, background="blue")
    assert reward.score(elsewhere, case) == pytest.approx(0.5 + 0.5 * 5 / 6)
    assert reward.score(replace(right, things=()), case) == pytest.approx(0.5 / 6)


def test_the_reward_is_the_judge_s_of_decoded_images(random_bundle):
    pipeline = Pipeline.load(random_bundle)
    tokens = torch.randint(64, (40, 8, 8))
    nothing = Reading("white", (), (32, 32))
    right = Reading("white", (Found("circle", "red", (0.5, 0.5), (0.5, 0.5), 0.9),), (32, 32))

    class Judge:
        def read(self, images):
            self.images = images
            return [right if i == 3 else nothing for i in range(len(images))]

    judge = Judge()
    case = Case(
        "shape_colour", BenchPrompt("red circle", Scene("white", (Thing("circle", "red"),)))
    )
    rewards = reward.judged_by(judge)(pipeline, tokens, [case] * 40)
    assert torch.equal(judge.images, pipeline.decode(tokens))
    assert rewards.argmax() == 3
    assert rewards.shape == (40,)


# ── the loss ──────────────────────────────────────────────────────────────────────────────────────


def test_log_probabilities_and_gradients_are_those_of_the_logits():
    features, projection = torch.randn(600, 20), torch.randn(300, 20)
    target, weights = torch.randint(300, (600,)), torch.randn(600)
    results = []
    for fused in (False, True):
        f, p = features.clone().requires_grad_(), projection.clone().requires_grad_()
        plain = (f @ p.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
        value = log_probability(f, p, target) if fused else plain
        results.append([value, *torch.autograd.grad((value * weights).sum(), [f, p])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_ratio_too_far_from_1_gains_nothing_more():
    ratio = torch.tensor([1.0, 1.2, 0.8, 1.2, 0.8], requires_grad=True)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    gain, clipped = reward.clipped_gain(ratio, signs, 0.1)
    assert gain.tolist() == pytest.approx([1.0, 1.1, 0.8, -1.2, -0.9])
    assert clipped.tolist() == [False, True, False, False, True]
    gain.sum().backward()
    assert ratio.grad.tolist() == [1, 0, 1, -1, 0]


def test_before_the_first_step_ratios_are_1_and_nothing_diverges(random_bundle, toy):
    student, start, own = made(random_bundle, toy)
    loss = reward.policy_loss(student, start, own, 1e-4, 0.02)
    for _ in range(own.steps):
        own.advance()
        value, figures = loss()
        assert figures["clipped"] == 0
        assert figures["kl"].item() == pytest.approx(0, abs=1e-4)
        assert figures["reward"].item() == pytest.approx(toy.means[0])
        assert value.item() == pytest.approx(-own.current.advantages.mean().item(), abs=1e-3)
    value.backward()
    assert all(p.grad is not None for p in student.denoiser.parameters())
    assert all(p.grad is None for p in start.denoiser.parameters())
    # After a change of the weights, there is a distance.
    with torch.no_grad():
        for p in student.denoiser.parameters():
            p.add_(0.02 * torch.randn_like(p))
    figures = loss()[1]
    assert figures["kl"] > 1e-3
    assert figures["clipped"] > 0


def test_a_step_makes_tokens_of_better_images_likelier(random_bundle, toy):
    student, start, own = made(random_bundle, toy)
    own.advance()
    states = own.current
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    reward.policy_loss(student, start, own, 1.0, 0.0)()[0].backward()
    optimizer.step()
    with torch.no_grad():
        features = reward.policy_features(student, states, start.attention_weights)
        change = reward.mean_log_probability(student, features, states) - states.old
    assert (change * states.advantages).mean() > 1e-4


# ── the training ──────────────────────────────────────────────────────────────────────────────────


def test_the_reward_rises(monkeypatch, random_bundle, toy, tmp_path):
    arguments = [f"{random_bundle}@steps=2", "--updates", 40, "--lr", 1e-2, "--clip", 0.2, *SMALL]
    run(monkeypatch, reward, tmp_path / "x.pt", *arguments)
    assert len(toy.means) == 10
    assert np.mean(toy.means[-3:]) > np.mean(toy.means[:2]) + 0.1, toy.means


def test_a_large_weight_of_the_divergence_keeps_the_network(
    monkeypatch, random_bundle, toy, tmp_path
):
    arguments = [f"{random_bundle}@steps=2", "--updates", 12, "--lr", 1e-2, "--clip", 0.2, *SMALL]
    begin = Pipeline.load(random_bundle).bundle.denoiser.state_dict()["clf.1.weight"]
    moved = []
    for weight in (0, 100):
        run(monkeypatch, reward, tmp_path / f"{weight}.pt", *arguments, "--kl", weight)
        end = loop.load(tmp_path / f"{weight}.pt")["model"]["denoiser.clf.1.weight"]
        moved.append((end - begin).norm().item())
    assert moved[1] < moved[0]


@pytest.mark.parametrize("crash_at", [2, 4])
def test_an_interrupted_training_ends_as_one_that_was_not(
    monkeypatch, random_bundle, toy, tmp_path, crash_at
):
    """In the middle of a rollout, and at its end."""
    common = [f"{random_bundle}@steps=2", "--updates", 6, *SMALL]
    run(monkeypatch, reward, tmp_path / "whole.pt", *common)
    torch.manual_seed(99)
    with pytest.raises(Crash):
        run(monkeypatch, reward, tmp_path / "parts.pt", *common, crash_at=crash_at)
    run(monkeypatch, reward, tmp_path / "parts.pt", *common, "--resume")
    whole, parts = (
        without_clock(loop.load(tmp_path / f"{name}.pt")) for name in ("whole", "parts")
    )
    assert whole["step"] == 6
    assert identical(whole, parts)


def test_the_command_to_use_it_names_the_bundle_and_the_recipe(
    monkeypatch, capsys, random_bundle, toy, tmp_path
):
    run(monkeypatch, reward, tmp_path / "x.pt", f"{random_bundle}@steps=2", "--updates", 1, *SMALL)
    line = next(line for line in capsys.readouterr().out.splitlines() if "to use it" in line)
    assert f"--base {random_bundle} " in line
    assert line.endswith("--recipe steps=2,guidance=1")


def test_an_invalid_recipe_ends_with_a_message(monkeypatch, random_bundle, toy, tmp_path):
    with pytest.raises(RecipeError, match="NAME=VALUE"):
        run(monkeypatch, reward, tmp_path / "x.pt", f"{find_bundle(str(random_bundle))}@steps")
