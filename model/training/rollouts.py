"""Draw images to learn from: groups of one prompt, their rewards, and their tokens noised again.

Letters: P prompts, G images of each, N = P · G images, T times, M = T · N states (an image at a
time), B states of a training step, H W token grid, L bytes, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.bundle import BundleV3
from model.config import SamplingConfig
from model.networks.denoiser_v3 import Denoiser
from model.optimize import optimize
from model.pipeline import Pipeline
from model.training.benchmark import size_of
from model.training.objective import ConditionInputs, NoisePath
from model.training.processes import rank, world
from model.training.prompts import BenchPrompt

_FIRST_SEED = 1_000_000  # of images; those that are evaluated have small seeds
_AT_ONCE = 32  # images drawn together
_MOST_ADVANTAGE = 2.0  # standard deviations
_LEVEL = 1e-4  # deviation of rewards below which a group says nothing


class Case(NamedTuple):
    """A prompt and its category of PaellaBench."""

    category: str
    prompt: BenchPrompt


# The rewards [N] of tokens [N, H, W], which the pipeline can decode, and of their cases.
Reward = Callable[[Pipeline, Tensor, Sequence[Case]], Tensor]


@dataclass(frozen=True, slots=True)
class States:
    """B states of images, and what was done in them.

    inputs: of the conditions, B rows. tokens: the images' clean tokens [B, H, W]. t: times [B].
    noisy: the tokens at these times. advantages: of the images, [B]. old: the mean log-probability
    [B] of the tokens when they were drawn.
    """

    inputs: ConditionInputs
    tokens: Tensor
    t: Tensor
    noisy: Tensor
    advantages: Tensor
    old: Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """N images of P prompts, G of one prompt after the other, and M states, of image m mod N each.

    byt5: [P, L, D]. mask: [P, L]. clip_text: [P, D']. clip_image: [N, D']. tokens: [N, H, W].
    rewards, advantages: [N]. t, old: [M]. noisy: [M, H, W].
    """

    byt5: Tensor
    mask: Tensor
    clip_text: Tensor
    clip_image: Tensor
    tokens: Tensor
    rewards: Tensor
    advantages: Tensor
    t: Tensor
    noisy: Tensor
    old: Tensor

    def states(self, members: Tensor) -> States:
        """Return some states; members: their numbers [B]."""
        image = members % len(self.tokens)
        prompt = image // (len(self.tokens) // len(self.byt5))
        inputs = ConditionInputs(
            self.byt5[prompt],
            self.mask[prompt],
            self.clip_text[prompt],
            self.clip_image[image],
            torch.ones(len(members), 2, dtype=torch.bool, device=members.device),
        )
        return States(
            inputs,
            self.tokens[image],
            self.t[members],
            self.noisy[members],
            self.advantages[image],
            self.old[members],
        )


def advantages(rewards: Tensor) -> Tensor:
    """Return how much better than its group each image is, in clipped deviations of its group.

    rewards: [P, G]. Zero in groups without differences.
    """
    spread = rewards.std(dim=1, keepdim=True, correction=0)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)) / spread.clamp_min(_LEVEL)
    return centred.masked_fill(spread < _LEVEL, 0).clamp(-_MOST_ADVANTAGE, _MOST_ADVANTAGE)


def stratified_times(count: int, images: int, steps: int, device: torch.device) -> Tensor:
    """Return times [count, images] of a sampler's steps, one in each of `count` stretches."""
    stretch = torch.arange(count, device=device)[:, None]
    place = (stretch + torch.rand(count, images, device=device)) / count
    return 1 - (place * steps).floor().clamp(max=steps - 1) / steps


@dataclass(frozen=True)
class Plan:
    """The sizes of a rollout. batch: states of a training step. seed: of the prompts' order."""

    prompts: int
    images: int
    times: int
    batch: int
    seed: int


class Rollouts:
    """Endless rollouts, one after the other, and of each its states in random order.

    Each is drawn with the weights that `network` has then. log_probability: the mean
    log-probability [B] of the tokens of states by the network.
    """

    def __init__(
        self,
        bundle: BundleV3,
        network: Denoiser,
        cases: Sequence[Case],
        sampling: SamplingConfig,
        plan: Plan,
        *,
        reward: Reward,
        log_probability: Callable[[States], Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.bundle = bundle
        self.network = network
        self.sampling = sampling
        self.plan = plan
        self.reward = reward
        self.log_probability = log_probability
        self.dtype = dtype
        aspects = dict.fromkeys(case.prompt.scene.aspect for case in cases)
        self._cases = [
            [case for case in cases if case.prompt.scene.aspect == aspect] for aspect in aspects
        ]
        self._made, self._taken = 0, 0
        self._rollout: Rollout | None = None
        self._current: States | None = None

    @property
    def current(self) -> States:
        """Return the states of this training step. Raises RuntimeError before `advance`."""
        if self._current is None:
            raise RuntimeError("no states before the first step")
        return self._current

    @property
    def mean_reward(self) -> Tensor:
        """Return the mean reward of the rollout that this step's states are from."""
        if self._rollout is None:
            raise RuntimeError("no rollout before the first step")
        return self._rollout.rewards.mean()

    @property
    def steps(self) -> int:
        """Return the training steps of one rollout."""
        p = self.plan
        return -(-p.prompts * p.images * p.times // p.batch)

    def advance(self) -> None:
        """Take the states of the next training step, of a new rollout if one is over."""
        if self._rollout is not None and self._taken == self.steps:
            self._made, self._taken, self._rollout = self._made + 1, 0, None
        if self._rollout is None:
            self._rollout = self._drawn()
        rng = np.random.default_rng([self.plan.seed, 1, self._number])
        order = torch.from_numpy(rng.permutation(len(self._rollout.t)))
        members = order.tensor_split(self.steps)[self._taken].to(self._rollout.t.device)
        self._current = self._rollout.states(members)
        self._taken += 1

    @property
    def _number(self) -> int:
        """The number of the rollout among those of all processes."""
        return self._made * world() + rank()

    def cases_of(self, number: int) -> list[Case]:
        """Return the P cases of a rollout, all of one aspect. All cases come once an epoch."""
        P = self.plan.prompts
        counts = [max(1, len(own) // P) for own in self._cases]
        epoch, place = divmod(number, sum(counts))
        rng = np.random.default_rng([self.plan.seed, 0, epoch])
        parts: list[list[Case]] = []
        for own, count in zip(self._cases, counts, strict=True):
            order = np.resize(rng.permutation(len(own)), count * P).reshape(count, P)
            parts += [[own[i] for i in some] for some in order.tolist()]
        return parts[int(rng.permutation(len(parts))[place])]

    @torch.no_grad()
    def _drawn(self) -> Rollout:
        p, number = self.plan, self._number
        cases = self.cases_of(number)
        size = size_of(cases[0].prompt.scene.aspect, self.bundle.config)
        pipeline = self._pipeline(size)
        prompts = pipeline.encode([case.prompt.text for case in cases])
        each = [prompt for prompt in prompts for _ in range(p.images)]
        first = _FIRST_SEED + number * len(each)
        seeds = range(first, first + len(each))
        s = self.sampling
        noises = [pipeline.noise(x, *size, s.steps, s.renoise_mode, s.renoise_order) for x in seeds]
        images = pipeline.prior_embeddings(each, noises)
        rows = [
            pipeline.start(noise, s, pipeline.condition(prompt, image), None)
            for noise, prompt, image in zip(noises, each, images, strict=True)
        ]
        parts = [pipeline.denoise(rows[i : i + _AT_ONCE]) for i in range(0, len(rows), _AT_ONCE)]
        # What is computed in inference mode takes part in no gradient; a copy may.
        tokens = torch.cat(parts).clone()
        groups = [case for case in cases for _ in range(p.images)]
        rewards = self.reward(pipeline, tokens, groups).float().to(tokens.device)
        times = stratified_times(p.times, len(tokens), s.steps, tokens.device).flatten()
        repeated = tokens.repeat(p.times, 1, 1)
        noisy, _ = NoisePath.of(repeated, self.network.config.num_labels).at(times)
        rollout = Rollout(
            torch.cat([prompt.byt5 for prompt in prompts]).clone(),
            torch.cat([prompt.mask for prompt in prompts]).clone(),
            torch.cat([prompt.clip for prompt in prompts]).clone(),
            torch.cat(images).clone(),
            tokens,
            rewards,
            advantages(rewards.view(p.prompts, p.images)).flatten(),
            times,
            noisy,
            torch.zeros_like(times),
        )
        every = torch.arange(len(times), device=times.device)
        old = [self.log_probability(rollout.states(some)) for some in every.split(p.batch)]
        return replace(rollout, old=torch.cat(old))

    def _pipeline(self, size: tuple[int, int]) -> Pipeline:
        """Return the bundle's pipeline with the network's weights of now."""
        frozen = deepcopy(self.network).to(self.dtype).eval().requires_grad_(False)
        factor = self.bundle.config.vqgan.downscale
        optimize([frozen], (size[1] // factor, size[0] // factor), "torch")
        return Pipeline.of(replace(self.bundle, denoiser=frozen))

    # ── its position ──────────────────────────────────────────────────────────────────────────────

    @property
    def skipped(self) -> Mapping[str, int]:
        """Return no files: there are none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the present rollout: later weights would draw another."""
        rollout = self._rollout
        kept = (
            {} if rollout is None else {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
        )
        return {"made": self._made, "taken": self._taken, "rollout": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. Only the first process has its rollout; others draw another."""
        self._made, self._taken = state["made"], state["taken"]
        kept = state["rollout"]
        self._rollout = Rollout(**kept) if kept and rank() == 0 else None
