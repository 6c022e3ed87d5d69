"""Align a bundle's denoiser with what its images are judged by.

    python -m model.training.reward one@steps=4 --updates 400
    python -m model.training.assemble aligned --base one --denoiser runs/reward.pt --recipe steps=4
    python -m model.training.recipes one@steps=4 aligned

After UDM-GRPO (arXiv 2604.18518), for networks that begin with uniform noise. Prompts of
PaellaBench's *reward* set are drawn in groups of images, in the recipe's steps, without guidance,
and the first judge reads them. An action is an image's final tokens; its states are these tokens,
noised again as in training, at a few of the sampler's times. Tokens of images that are better than
their group become likelier, others less likely, as far as the clipped ratio of their mean
log-probabilities permits, and a divergence keeps the network near the one that it began as.
Letters: N images, B states, H W token grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.bundle import BundleV3
from model.bundle_files import BundleError
from model.pipeline import Pipeline
from model.training import benchmark, command, denoiser, loop
from model.training.arguments import COUNT, NOT_NEGATIVE
from model.training.checker import Reading, check
from model.training.detector import WEIGHTS, Detector
from model.training.distill import starting_network
from model.training.distillation import Student, Teacher, trained_condition
from model.training.judged import divergence, log_probability
from model.training.objective import (
    attention,
    choose_positions,
    gathered,
    in_products,
    projection_of,
)
from model.training.recipes import loaded
from model.training.rollouts import Case, Plan, Reward, Rollouts, States

_RATE = 3e-5
_UPDATES = 400
_BATCH = 64  # states of a step
_PROMPTS, _IMAGES, _TIMES = 16, 8, 4
_CLIP, _KL = 2e-3, 0.02
_COMPARED = 0.25  # of the positions, for the divergence
_AT_ONCE = 32  # images decoded together
# Its pairs must remain those that no training shows; the control has pairs that training does.
_UNSEEN = "unseen_combinations"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = loop.parser(
        __doc__, name="reward", batch=_BATCH, lr=_RATE, minutes=60, steps_option="--updates"
    )
    p.set_defaults(warmup=10, ema=0.99)
    p.add_argument(
        "bundle", metavar="BUNDLE[@CHANGES]", help="name or path, and changes of its recipe"
    )
    p.add_argument("--teacher", type=Path, help="checkpoint to begin with, instead of the bundle's")
    p.add_argument(
        "--prompts", type=COUNT, default=_PROMPTS, help="prompts of a rollout (default %(default)s)"
    )
    p.add_argument(
        "--images", type=COUNT, default=_IMAGES, help="images of each prompt (default %(default)s)"
    )
    p.add_argument(
        "--times",
        type=COUNT,
        default=_TIMES,
        help="how many times each image is noised again at (default %(default)s)",
    )
    p.add_argument(
        "--clip",
        type=NOT_NEGATIVE,
        default=_CLIP,
        help=f"how far the ratio of mean log-probabilities may be from 1 ({_CLIP:g})",
    )
    p.add_argument(
        "--kl",
        type=NOT_NEGATIVE,
        default=_KL,
        help=f"weight of the divergence from the beginning ({_KL:g})",
    )
    p.add_argument("--judge", type=Path, default=WEIGHTS, help="the judge's weights, a file")
    return p


# ── the reward ────────────────────────────────────────────────────────────────────────────────────


def reward_cases() -> list[Case]:
    """Return the prompts to learn from: the reward set, without the pairs that stay unseen."""
    found = benchmark.categories("reward")
    return [Case(name, prompt) for name, own in found.items() if name != _UNSEEN for prompt in own]


def score(reading: Reading, case: Case) -> float:
    """Return an image's reward, 0 … 1: half for its category's criterion, half for all words."""
    scene = case.prompt.scene
    verdict = check(reading, scene)
    words = (
        verdict.background,
        verdict.count,
        verdict.kinds,
        verdict.colours,
        verdict.attribution,
        verdict.positions,
    )
    right = benchmark.CRITERIA[case.category](verdict, scene)
    return 0.5 * right + 0.5 * sum(words) / len(words)


def judged_by(judge: Detector) -> Reward:
    """Return the reward by a judge's readings."""

    def reward(pipeline: Pipeline, tokens: Tensor, cases: Sequence[Case]) -> Tensor:
        images = torch.cat([pipeline.decode(part) for part in tokens.split(_AT_ONCE)])
        return torch.tensor([score(*pair) for pair in zip(judge.read(images), cases, strict=True)])

    return reward


# ── the loss ──────────────────────────────────────────────────────────────────────────────────────


def policy_features(
    student: Student, states: States, weights: tuple[float, float] | None
) -> Tensor:
    """Return the student's features [B, H, W, c_out] in states.

    weights: of the attention, as a recipe's.
    """
    network = student.denoiser
    with in_products(network), attention(states.t.device):
        condition = trained_condition(network, states.inputs, weights)
        return network.features(states.noisy, network.times(states.t), condition)


def mean_log_probability(student: Student, features: Tensor, states: States) -> Tensor:
    """Return the mean log-probability [B] of the states' clean tokens, over all positions."""
    flat = log_probability(
        features.flatten(0, 2), projection_of(student.denoiser), states.tokens.flatten()
    )
    return flat.view(len(states.tokens), -1).mean(dim=1)


def policy_loss(
    student: Student, start: Teacher, rollouts: Rollouts, clip: float, kl: float
) -> loop.Loss:
    """Return the loss of the rollouts' current states.

    start: the network before the first step. clip, kl: as of the command line.
    """

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        states = rollouts.current
        features = policy_features(student, states, start.attention_weights)
        ratio = (mean_log_probability(student, features, states) - states.old).exp()
        gain, clipped = clipped_gain(ratio, states.advantages, clip)
        compared = choose_positions(states.tokens, _COMPARED)
        target = start.features(states.noisy, states.t, start.conditions(states.inputs))
        count = compared.numel()
        distance, _ = divergence(
            gathered(features, compared),
            projection_of(student.denoiser),
            gathered(target, compared),
            projection_of(start.denoiser),
            torch.full((count,), 1 / count, device=features.device),
            reverse=True,
        )
        return kl * distance - gain.mean(), {
            "reward": rollouts.mean_reward,
            "kl": distance.detach(),
            "clipped": clipped.float().mean(),
        }

    return loss


def clipped_gain(ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return what each state gains, [B], and where a ratio is too far from 1 to gain more.

    ratio, advantages: [B].
    """
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(free, bounded), bounded.detach() < free.detach()


# ── the training ──────────────────────────────────────────────────────────────────────────────────


def train(args: argparse.Namespace) -> None:
    """Train as the parsed command line says.

    Raises the errors of `recipes.loaded`, FileNotFoundError without the judge, and BundleError for
    networks of another family.
    """
    if args.steps is None:
        args.steps = _UPDATES
    o = replace(loop.options(args), record=False)  # every rollout has prompts of another length
    pipeline = loaded(args.bundle, o.device, torch.float32)
    bundle = pipeline.bundle
    if not isinstance(bundle, BundleV3):
        raise BundleError(f"{args.bundle} holds no v3 networks")
    network = starting_network(bundle, args.teacher, o.device)
    sampling = bundle.config.recipe.sampling(guidance=(1.0, 1.0))
    student = Student(network)
    start = replace(Teacher.of(network, bundle, sampling, o.dtype), nothing=None)
    reward = judged_by(Detector.load(args.judge, o.device))

    def old_log_probability(states: States) -> Tensor:
        with torch.autocast(o.device.type, o.dtype, enabled=o.dtype != torch.float32):
            features = policy_features(student, states, start.attention_weights)
            return mean_log_probability(student, features, states)

    rollouts = Rollouts(
        bundle,
        network,
        reward_cases(),
        sampling,
        Plan(args.prompts, args.images, args.times, o.batch, args.seed),
        reward=reward,
        log_probability=old_log_probability,
        dtype=o.dtype,
    )
    loss = policy_loss(student, start, rollouts, args.clip, args.kl)
    loop.fit(student, loss, o, data=rollouts, before=rollouts.advance)


def main() -> None:
    """Train as the command line says."""
    args = parser().parse_args()
    name, _, changes = args.bundle.partition("@")

    def trained(own: argparse.Namespace) -> None:
        train(own)
        own.bundle = name

    recipe = ",".join(filter(None, (changes, "guidance=1")))
    denoiser.run(trained, args, "--recipe", recipe)


if __name__ == "__main__":
    command.run(main)
