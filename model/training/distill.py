"""Distil a bundle's denoiser: one branch instead of two, by teaching what guidance comes to.

    python -m model.training.distill tiny --guidance --minutes 60
    python -m model.training.distill tiny --guidance 2 --data my-images --updates 5000
    python -m model.training.assemble one --base tiny --denoiser runs/distilled.pt

The student is the same network and begins with the teacher's weights. Both see the same noised
images and conditions; the student's prediction follows the teacher's guided one, which takes two
branches. Afterwards it draws with guidance 1, in half of the passes. The training data are those of
`model.training.denoiser`: a corpus' scenes, or with --data your own images. Letters: B rows, H W
token grid, n steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import sampling
from model.bundle import BundleV3, load_v3
from model.config import MAX_GUIDANCE, Recipe, SamplingConfig, find_bundle
from model.networks.denoiser_v3 import Condition, Denoiser
from model.training import checkpoint, denoiser, loop
from model.training.codes import quiet
from model.training.data import Scenes
from model.training.decoding import Filters
from model.training.denoiser import EARLY, FOCUS, JUDGED, JUDGED_OF_SCENES, Encoding
from model.training.features import Examples, Pool
from model.training.judged import divergence
from model.training.objective import (
    ConditionInputs,
    attention,
    choose_positions,
    condition_of,
    corrupt,
    disturbed,
    draw_times,
    folded,
    gathered,
    in_products,
    position_weights,
    projection_of,
)

# In use a student nearly always has all of a condition, unlike the network that it comes from.
_DROP_CLIP = 0.1
# Shares of captions that are empty, without and with the image's embedding. The empty ones say what
# is drawn without a prompt; nothing is guided by them any more.
_EMPTY, _SHOWN = 0.02, 0.08
_RATE = 3e-4
_ROUNDING = 1e-3  # of a step
_RECIPE = "recipe"  # as much guidance as it says


class Student(nn.Module):
    """The network that is trained, named as in the checkpoints of `model.training.denoiser`."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.denoiser = network


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser, and what guides it.

    nothing: the condition of an empty prompt, one row. guidances: of each step of the recipe, [n].
    attention_weights: of the recipe, as `Recipe.attention_weights`.
    """

    denoiser: Denoiser
    nothing: Condition
    guidances: Tensor
    attention_weights: tuple[float, float] | None = None

    @classmethod
    def of(
        cls, network: Denoiser, bundle: BundleV3, config: SamplingConfig, dtype: torch.dtype
    ) -> Teacher:
        """Return a teacher with a network's weights, guided as `config` says.

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
        guidances = torch.tensor(sampling.guidances(config), device=device)
        return cls(frozen, nothing, guidances, bundle.config.recipe.attention_weights)

    def guidance(self, t: Tensor) -> Tensor:
        """Return the guidance [B] at times t [B], that of the recipe's step there."""
        n = len(self.guidances)
        # A step's own time may be rounded to a little more.
        return self.guidances[((1 - t) * n + _ROUNDING).long().clamp(0, n - 1)]

    @torch.no_grad()
    def features(self, noisy: Tensor, t: Tensor, inputs: ConditionInputs) -> Tensor:
        """Return guided features [B, H, W, c_out] of noised tokens [B, H, W] at times t [B]."""
        B, device = len(noisy), noisy.device
        with torch.autocast(device.type, enabled=False):
            asked = condition_of(self.denoiser, inputs, self.attention_weights)
            rows = torch.arange(B, device=device).repeat(2)
            both = joined(asked, self.nothing)
            features = self.denoiser.features(noisy, self.denoiser.times(t), both, rows)
            conditional, unconditional = features.float().chunk(2)
            g = self.guidance(t)[:, None, None, None]
            return (g * conditional + (1 - g) * unconditional).to(features.dtype)


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
    """What one kind of step learns from.

    draw: returns a batch. early: as of `draw_times`. judged, focus: as of `choose_positions`.
    drop_clip: the probability of dropping each of CLIP's embeddings.
    """

    draw: Callable[[], Examples]
    early: float = 1.0
    judged: float = JUDGED
    focus: float = 1.0
    drop_clip: float = _DROP_CLIP


def guidance_loss(student: Student, teacher: Teacher, draws: Draws) -> loop.Loss:
    """Return the loss KL(the teacher's guided prediction ‖ the student's), at random times."""
    network = student.denoiser

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = draws.draw()
        t = draw_times(len(x.tokens), x.tokens.device, draws.early)
        noisy, noised = corrupt(x.tokens, t, network.config.num_labels)
        judged = choose_positions(x.tokens, draws.judged, draws.focus, x.commonest)
        inputs = disturbed(x, draws.drop_clip)
        target = gathered(teacher.features(noisy, t, inputs), judged)
        with in_products(network), attention(t.device):
            condition = trained_condition(network, inputs, teacher.attention_weights)
            asked = gathered(network.features(noisy, network.times(t), condition), judged)
        weights = position_weights(t, noised, judged)
        value, agreed = divergence(
            asked,
            projection_of(network),
            target,
            projection_of(teacher.denoiser),
            weights / len(asked),
        )
        return value, {"agreed": agreed.float().mean()}

    return loss


def trained_condition(
    network: Denoiser, inputs: ConditionInputs, weights: tuple[float, float] | None
) -> Condition:
    """Return a batch's condition, through which gradients pass; see `condition_of`."""
    # Folded maps are weighted in place, which autograd does not permit.
    with folded(network) if weights is None else nullcontext():
        return condition_of(network, inputs, weights)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = loop.parser(
        __doc__, name="distilled", batch=32, lr=_RATE, minutes=60, steps_option="--updates"
    )
    p.add_argument("bundle", help="name or path of the teacher's bundle")
    p.add_argument(
        "--guidance",
        nargs="?",
        type=_guidance,
        const=_RECIPE,
        help="teach what guidance comes to: this much, by default the recipe's",
    )
    p.add_argument(
        "--teacher", type=Path, help="checkpoint of a denoiser, instead of the bundle's own"
    )
    denoiser.add_data_arguments(p)
    p.add_argument(
        "--drop-clip",
        type=float,
        default=_DROP_CLIP,
        help=f"how often each of CLIP's embeddings is dropped ({_DROP_CLIP:g})",
    )
    return p


def _guidance(text: str) -> float | str:
    if text == _RECIPE:
        return text
    value = float(text)
    if not 0 <= value <= MAX_GUIDANCE:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {MAX_GUIDANCE}")
    return value


def guided_sampling(recipe: Recipe, guidance: float | str) -> SamplingConfig:
    """Return the recipe's sampling, with constant guidance if that is a number."""
    if isinstance(guidance, str):
        return recipe.sampling()
    steps = recipe.num_inference_steps
    return recipe.sampling(guidance=(guidance, guidance), guidance_steps=steps)


def starting_network(bundle: BundleV3, teacher: Path | None, device: torch.device) -> Denoiser:
    """Return the denoiser that the teacher is and the student begins as, in fp32.

    teacher: a checkpoint to take it from, instead of the bundle.
    """
    network = Denoiser(bundle.config.denoiser).to(device)
    network.load_state_dict(
        bundle.denoiser.state_dict()
        if teacher is None
        else checkpoint.averaged(loop.load(teacher, device), "denoiser.")
    )
    return network


def train(args: argparse.Namespace) -> None:
    """Train as the parsed command line says.

    Raises DataError for unusable data, and the errors of `load_v3`.
    """
    o = loop.options(args)
    bundle = load_v3(find_bundle(args.bundle), o.device, torch.float32)
    network = starting_network(bundle, args.teacher, o.device)
    if args.data is None:
        quiet(network)
    config = guided_sampling(bundle.config.recipe, args.guidance)
    teacher = Teacher.of(network, bundle, config, o.dtype)
    student = Student(network)
    if args.data is not None:
        data = denoiser.own_images(bundle, o, args.data, Filters(args.min_side, args.max_aspect))
        draws = Draws(lambda: next(data), drop_clip=args.drop_clip)
        # Batches are of many lengths, and made on the host.
        loop.fit(
            student, guidance_loss(student, teacher, draws), replace(o, record=False), data=data
        )
        return
    scenes = Scenes.load(args.corpus, o.device, o.data_seed)
    encoding = Encoding.of(bundle.config, bundle.vqgan, scenes, o.batch, args.kept, o.dtype)
    encoding.begin()
    losses = encoding.losses(
        lambda pool, batch, bytes_read: guidance_loss(
            student, teacher, scene_draws(pool, batch, bytes_read, args.drop_clip)
        )
    )
    loop.fit(student, losses, o, data=encoding, before=encoding.grow)


def scene_draws(pool: Pool, batch: int, bytes_read: int, drop_clip: float) -> Draws:
    """Return the draws of scenes from a pool."""
    return Draws(
        lambda: pool.draw(batch, bytes_read, _EMPTY, _SHOWN),
        EARLY,
        JUDGED_OF_SCENES,
        FOCUS,
        drop_clip,
    )


def main() -> None:
    """Distil as the command line says; exit with a message for unusable data."""
    p = parser()
    args = p.parse_args()
    if args.guidance is None:
        p.error("--guidance is needed")
    denoiser.run(train, args, "--recipe", "guidance=1")


if __name__ == "__main__":
    main()
