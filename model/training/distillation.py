"""Define what a distilled denoiser learns: its teacher, and the loss of each kind of distillation.

`distill.py` is the command. Letters: B rows, H W token grid, n steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import sampling
from model.bundle import BundleV3
from model.config import SamplingConfig
from model.networks.denoiser_v3 import Condition, Denoiser
from model.training import loop
from model.training.denoiser import JUDGED
from model.training.features import Examples
from model.training.judged import divergence
from model.training.objective import (
    ConditionInputs,
    NoisePath,
    attention,
    choose_positions,
    condition_of,
    disturbed,
    draw_times,
    folded,
    gathered,
    in_products,
    position_weights,
    projection_of,
)

# In use a student nearly always has all of a condition, unlike the network that it comes from.
DROP_CLIP = 0.1
_ROUNDING = 1e-3  # of a step
_DRAWN_AT_ONCE = 2**15  # tokens, whose logits over 8192 codes are 1 GiB in fp32


class Student(nn.Module):
    """The network that is trained, named as in the checkpoints of `model.training.denoiser`."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.denoiser = network


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser, and how it draws.

    nothing: the condition of an empty prompt, one row; None for a teacher without guidance.
    guidances, temperatures: of each step of the recipe, [n]. attention_weights: of the recipe, as
    `Recipe.attention_weights`. greedy: whether it draws the likeliest codes.
    """

    denoiser: Denoiser
    nothing: Condition | None
    guidances: Tensor
    temperatures: Tensor
    attention_weights: tuple[float, float] | None = None
    greedy: bool = False

    @classmethod
    def of(
        cls, network: Denoiser, bundle: BundleV3, config: SamplingConfig, dtype: torch.dtype
    ) -> Teacher:
        """Return a teacher with a network's weights, which draws as `config` says.

        bundle: whose encoders read the empty prompt. dtype: of the products.
        """
        frozen = frozen_copy(network, dtype)
        device = next(frozen.parameters()).device
        text = bundle.byt5([""])
        with torch.no_grad():
            nothing = frozen.condition(
                text.embeddings.to(device, dtype),
                text.mask.to(device),
                bundle.clip.encode_text([""]).to(device, dtype),
            )
        return cls(
            frozen,
            nothing,
            torch.tensor(sampling.guidances(config), device=device),
            torch.tensor(sampling.ramp(config.temperature, config.steps), device=device),
            bundle.config.recipe.attention_weights,
            config.sampler == "argmax",
        )

    def succeeded_by(self, network: Denoiser, dtype: torch.dtype) -> Teacher:
        """Return a teacher with another network's weights, and without guidance."""
        return replace(self, denoiser=frozen_copy(network, dtype), nothing=None)

    def guidance(self, t: Tensor) -> Tensor:
        """Return the guidance [B] at times t [B], that of the recipe's step there."""
        return self._at(t, self.guidances)

    def _at(self, t: Tensor, values: Tensor) -> Tensor:
        n = len(values)
        # A step's own time may be rounded to a little more.
        return values[((1 - t) * n + _ROUNDING).long().clamp(0, n - 1)]

    @torch.no_grad()
    def conditions(self, inputs: ConditionInputs) -> Condition:
        """Return the conditions of B rows, followed by the unconditional ones if it is guided."""
        with torch.autocast(inputs.byt5.device.type, enabled=False):
            asked = condition_of(self.denoiser, inputs, self.attention_weights)
            return asked if self.nothing is None else joined(asked, self.nothing)

    @torch.no_grad()
    def features(self, noisy: Tensor, t: Tensor, conditions: Condition) -> Tensor:
        """Return features [B, H, W, c_out] of noised tokens [B, H, W] at times t [B], guided.

        conditions: the result of `conditions`.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            times = self.denoiser.times(t)
            if self.nothing is None:
                return self.denoiser.features(noisy, times, conditions)
            rows = torch.arange(len(noisy), device=noisy.device).repeat(2)
            features = self.denoiser.features(noisy, times, conditions, rows)
            conditional, unconditional = features.float().chunk(2)
            g = self.guidance(t)[:, None, None, None]
            return (g * conditional + (1 - g) * unconditional).to(features.dtype)

    @torch.no_grad()
    def step(
        self, noisy: Tensor, t: Tensor, s: Tensor, conditions: Condition, noise: Tensor
    ) -> Tensor:
        """Return the tokens [B, H, W] after one step of the sampler, from times t to s, [B] each.

        noise: the codes [B, H, W] that take the place of those that become noise again.
        """
        features = self.features(noisy, t, conditions)
        inverse = 1 / self._at(t, self.temperatures)
        uniform = torch.rand(noisy.shape, device=noisy.device)
        drawn = self._draw(features, inverse, uniform)
        return sampling.renoise(drawn, noise, torch.rand(noisy.shape, device=noisy.device), s)

    def _draw(self, features: Tensor, inverse: Tensor, uniform: Tensor) -> Tensor:
        """Draw codes [B, H, W], a few rows at a time. inverse: one over the temperature, [B]."""
        rows = max(1, _DRAWN_AT_ONCE // features[0, ..., 0].numel())
        parts = zip(*(x.split(rows) for x in (features, inverse, uniform)), strict=True)
        with torch.autocast(features.device.type, enabled=False):
            return torch.cat([self._draw_part(*part) for part in parts])

    def _draw_part(self, features: Tensor, inverse: Tensor, uniform: Tensor) -> Tensor:
        if self.greedy:
            return self.denoiser.project(features).argmax(-1)
        logits = self.denoiser.sharpened(features, inverse[:, None, None, None])
        return sampling.inverse_cdf(logits, uniform)


def frozen_copy(network: Denoiser, dtype: torch.dtype) -> Denoiser:
    """Return a copy that is not trained, of this type, with its fixed weights folded."""
    copy = deepcopy(network).to(dtype).eval().requires_grad_(False)
    copy.fold()
    copy.fold_condition()
    return copy


def joined(asked: Condition, nothing: Condition) -> Condition:
    """Return the conditions of B rows, then the unconditional one B times; the shorter is padded.

    nothing: a condition of one row.
    """
    B, length = len(asked.kv), max(asked.length, nothing.length)
    one, other = padded(asked, length), padded(nothing, length)
    return Condition(
        torch.cat([one.kv, other.kv.expand(B, -1, -1)]),
        torch.cat([_mask(one), _mask(other).expand(B, -1)]),
    )


def padded(condition: Condition, length: int) -> Condition:
    """Return a condition with masked keys behind its own, `length` in all."""
    more = length - condition.length
    return Condition(F.pad(condition.kv, (0, 0, 0, more)), F.pad(_mask(condition), (0, more)))


def _mask(condition: Condition) -> Tensor:
    if condition.mask is not None:
        return condition.mask
    return torch.ones(condition.kv.shape[:2], dtype=torch.bool, device=condition.kv.device)


@dataclass(frozen=True)
class Draws:
    """The examples of one kind of step.

    draw: returns a batch. early: as of `draw_times`. judged, focus: as of `choose_positions`.
    drop_clip: the probability of dropping each of CLIP's embeddings.
    """

    draw: Callable[[], Examples]
    early: float = 1.0
    judged: float = JUDGED
    focus: float = 1.0
    drop_clip: float = DROP_CLIP


def guidance_loss(student: Student, teacher: Teacher, draws: Draws) -> loop.Loss:
    """Return the loss KL(the teacher's prediction ‖ the student's), at random times."""

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = draws.draw()
        t = draw_times(len(x.tokens), x.tokens.device, draws.early)
        noisy, noised = _path(student, x).at(t)
        inputs = disturbed(x, draws.drop_clip)
        target = teacher.features(noisy, t, teacher.conditions(inputs))
        return _followed(student, teacher, draws, Task(x, inputs, t, noisy, noised, target), False)

    return loss


def consistency_loss(
    student: Student, teacher: Teacher, draws: Draws, steps: int, reverse: bool = True
) -> loop.Loss:
    """Return the loss by which a step learns what the next one would have said.

    After Duo's discrete consistency distillation (arXiv 2506.10892): KL(the student's prediction at
    t ‖ the teacher's at t − 1/steps), or the other way round if not `reverse`. Both see the same
    image, with the same noise.
    """

    def target(step: Step, conditions: Condition) -> Tensor:
        return teacher.features(step.path.at(step.s)[0], step.s, conditions)

    return _step_loss(student, teacher, draws, steps, reverse, target)


def progressive_loss(
    student: Student, teacher: Teacher, draws: Draws, steps: int, reverse: bool = True
) -> loop.Loss:
    """Return the loss by which one step learns what two of the teacher's come to.

    Progressive distillation: the teacher takes a step of its sampler, half as long as the
    student's, and the student follows its prediction after that, as in `consistency_loss`.
    """

    def target(step: Step, conditions: Condition) -> Tensor:
        middle = (step.t + step.s) / 2
        between = teacher.step(step.noisy, step.t, middle, conditions, step.path.noise)
        return teacher.features(between, middle, conditions)

    return _step_loss(student, teacher, draws, steps, reverse, target)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the sampler on a noised image. t, s: where it begins and ends, [B] each.

    noisy: the tokens [B, H, W] at t.
    """

    path: NoisePath
    t: Tensor
    s: Tensor
    noisy: Tensor


def _step_loss(
    student: Student,
    teacher: Teacher,
    draws: Draws,
    steps: int,
    reverse: bool,
    target: Callable[[Step, Condition], Tensor],
) -> loop.Loss:
    """Return the loss of following a target in steps of 1/steps.

    target: returns the teacher's features [B, H, W, c_out] for a step and the conditions.
    """

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = draws.draw()
        t, s = step_times(len(x.tokens), x.tokens.device, 1 / steps, draws.early)
        path = _path(student, x)
        noisy, noised = path.at(t)
        inputs = disturbed(x, draws.drop_clip)
        wanted = target(Step(path, t, s, noisy), teacher.conditions(inputs))
        task = Task(x, inputs, t, noisy, noised, wanted)
        return _followed(student, teacher, draws, task, reverse)

    return loss


def step_times(
    count: int, device: torch.device, gap: float, early: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return where steps of a length begin and end, [count] each.

    They begin between `gap` and 1, a share of `gap` of them at 1, more of them where `early`, as of
    `draw_times`, is more.
    """
    t = (draw_times(count, device, early) + gap).clamp(max=1)
    return t, (t - gap).clamp(min=0)


def _path(student: Student, x: Examples) -> NoisePath:
    return NoisePath.of(x.tokens, student.denoiser.config.num_labels)


@dataclass(frozen=True, slots=True)
class Task:
    """The inputs of a student, and its target.

    t: [B]. noisy: [B, H, W] tokens at t. noised: where they are noise. target: features
    [B, H, W, c_out] of the teacher.
    """

    x: Examples
    inputs: ConditionInputs
    t: Tensor
    noisy: Tensor
    noised: Tensor
    target: Tensor


def _followed(
    student: Student, teacher: Teacher, draws: Draws, task: Task, reverse: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return how far the student's prediction is from its task, at chosen positions, and figures.

    reverse: KL(the student's ‖ the teacher's), else KL(the teacher's ‖ the student's).
    """
    network, t = student.denoiser, task.t
    judged = choose_positions(task.x.tokens, draws.judged, draws.focus, task.x.commonest)
    with in_products(network), attention(t.device):
        condition = trained_condition(network, task.inputs, teacher.attention_weights)
        features = network.features(task.noisy, network.times(t), condition)
        asked = gathered(features, judged)
    value, agreed = divergence(
        asked,
        projection_of(network),
        gathered(task.target, judged),
        projection_of(teacher.denoiser),
        position_weights(t, task.noised, judged) / len(asked),
        reverse=reverse,
    )
    return value, {"agreed": agreed.float().mean()}


def trained_condition(
    network: Denoiser, inputs: ConditionInputs, weights: tuple[float, float] | None
) -> Condition:
    """Return a batch's condition, through which gradients pass; see `condition_of`."""
    # Folded maps are weighted in place, which autograd does not permit.
    with folded(network) if weights is None else nullcontext():
        return condition_of(network, inputs, weights)
