"""Distil a bundle's denoiser: one branch instead of two, and fewer steps.

    python -m model.training.distill tiny --guidance --minutes 60
    python -m model.training.distill tiny --guidance 2 --data my-images --updates 5000
    python -m model.training.assemble one --base tiny --denoiser runs/distilled.pt
    python -m model.training.distill tiny --guidance --steps 8,4,2 --updates 1500
    python -m model.training.distill tiny --teacher runs/distilled.pt --steps 4 --progressive
    python -m model.training.distill tiny --guidance --prune down_blocks.1.3,down_blocks.1.9

The student is the same network, or with --prune the same without some blocks, and begins with the
teacher's weights. With --guidance its prediction follows the teacher's guided one, which takes two
branches. Afterwards it draws with guidance 1, in half of the passes. With --steps there is a round
of training for every number of steps: a prediction follows the teacher's at the sampler's next
time, or with --progressive after a step of the teacher's sampler that is half as long. The student
of one round is the teacher of the next. The training data are those of `model.training.denoiser`: a
corpus' scenes, or with --data your own images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from model.bundle import BundleV3, load_v3
from model.config import MAX_GUIDANCE, Recipe, SamplingConfig, find_bundle
from model.networks.denoiser_v3 import Denoiser
from model.training import block_skips, checkpoint, command, denoiser, loop, pruning
from model.training.arguments import SHARE, at_least, number_in
from model.training.captioned import DataError
from model.training.codes import quiet
from model.training.data import Scenes
from model.training.decoding import Filters
from model.training.denoiser import EARLY, FOCUS, JUDGED_OF_SCENES, Encoding
from model.training.distillation import (
    DROP_CLIP,
    Draws,
    Student,
    Teacher,
    consistency_loss,
    guidance_loss,
    progressive_loss,
)
from model.training.features import Pool

# Shares of captions that are empty, without and with the image's embedding. The empty ones say what
# is drawn without a prompt; nothing is guided by them any more.
_EMPTY, _SHOWN = 0.02, 0.08
_RATE = 3e-4
_ROUND = 1500  # training steps
_MOST_STEPS = 64
_RECIPE = "recipe"  # as much guidance as it says


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
        "--steps",
        dest="rounds",
        type=_rounds,
        metavar="N[,N…]",
        help=f"teach to draw in fewer steps, a round of --updates (default {_ROUND}) for each "
        "number, such as 8,4,2. Every round has a checkpoint of its own; --minutes is not read",
    )
    p.add_argument(
        "--progressive",
        action="store_true",
        help="with --steps: one step follows two of the teacher's sampler",
    )
    p.add_argument(
        "--forward",
        action="store_true",
        help="with --steps: minimise KL(teacher ‖ student), not KL(student ‖ teacher)",
    )
    p.add_argument(
        "--teacher", type=Path, help="checkpoint of a denoiser, instead of the bundle's own"
    )
    denoiser.add_data_arguments(p)
    block_skips.add_argument(p)
    pruning.add_argument(p)
    p.add_argument(
        "--drop-clip",
        type=SHARE,
        default=DROP_CLIP,
        help=f"how often each of CLIP's embeddings is dropped ({DROP_CLIP:g})",
    )
    return p


def _guidance(text: str) -> float | str:
    if text == _RECIPE:
        return text
    return number_in(f"from 0 to {MAX_GUIDANCE:g}", lambda value: 0 <= value <= MAX_GUIDANCE)(text)


def _rounds(text: str) -> tuple[int, ...]:
    numbers = tuple(at_least(0)(part) for part in text.split(","))
    falling = all(a > b for a, b in pairwise(numbers))
    if not falling or not 1 <= numbers[-1] <= numbers[0] <= _MOST_STEPS:
        raise argparse.ArgumentTypeError(
            f"{text} is not one or several falling numbers from {_MOST_STEPS} to 1"
        )
    return numbers


def guided_sampling(recipe: Recipe, guidance: float | str | None) -> SamplingConfig:
    """Return the recipe's sampling, with constant guidance if that is a number.

    guidance: None for none.
    """
    if guidance == _RECIPE:
        return recipe.sampling()
    constant = 1.0 if guidance is None else float(guidance)
    steps = recipe.num_inference_steps
    return recipe.sampling(guidance=(constant, constant), guidance_steps=steps)


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


# ── data ──────────────────────────────────────────────────────────────────────────────────────────

LossOf = Callable[[Draws], loop.Loss]


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    losses: return what to minimise, by the loss of each kind of batch. before: called before every
    step. recordable: whether a step can be recorded.
    """

    data: loop.Data
    losses: Callable[[LossOf], loop.Loss | loop.Mixture]
    before: Callable[[], None] | None
    recordable: bool

    @classmethod
    def of_images(cls, bundle: BundleV3, o: loop.Options, args: argparse.Namespace) -> Source:
        """Return the source of the user's images. Raises DataError for unusable data."""
        filters = Filters(args.min_side, args.max_aspect)
        data = denoiser.own_images(bundle, o, args.data, filters)
        draws = Draws(lambda: next(data), drop_clip=args.drop_clip)
        # Batches are of many lengths, and made on the host.
        return cls(data, lambda loss_of: loss_of(draws), None, recordable=False)

    @classmethod
    def of_scenes(cls, bundle: BundleV3, o: loop.Options, args: argparse.Namespace) -> Source:
        """Return the source of a corpus' scenes."""
        scenes = Scenes.load(args.corpus, o.device, o.data_seed)
        encoding = Encoding.of(
            bundle.config,
            bundle.vqgan,
            scenes,
            o.batch,
            args.kept,
            o.dtype,
            stencils=denoiser.known_stencils(args),
        )
        encoding.begin()

        def losses(loss_of: LossOf) -> loop.Mixture:
            return encoding.losses(
                lambda pool, batch, read: loss_of(scene_draws(pool, batch, read, args.drop_clip))
            )

        return cls(encoding, losses, encoding.grow, recordable=True)


def scene_draws(pool: Pool, batch: int, bytes_read: int, drop_clip: float) -> Draws:
    """Return the draws of scenes from a pool."""
    return Draws(
        lambda: pool.draw(batch, bytes_read, _EMPTY, _SHOWN),
        EARLY,
        JUDGED_OF_SCENES,
        FOCUS,
        drop_clip,
    )


# ── rounds ────────────────────────────────────────────────────────────────────────────────────────


class Round(NamedTuple):
    """A training with one teacher. steps: to learn to draw in, None to learn guidance alone."""

    steps: int | None
    checkpoint: Path

    def done(self, updates: int | None) -> bool:
        """Return whether it has been trained for so many steps."""
        if updates is None or not self.checkpoint.exists():
            return False
        return bool(loop.load(self.checkpoint)["step"] >= updates)


def rounds_of(args: argparse.Namespace) -> list[Round]:
    """Return the rounds that the command line asks for; several have a file each."""
    if args.rounds is None:
        return [Round(None, args.checkpoint)]
    path: Path = args.checkpoint
    return [Round(n, path.with_name(f"{path.stem}-{n}{path.suffix}")) for n in args.rounds]


def first_round(rounds: Sequence[Round], updates: int | None) -> int:
    """Return the number of the first round that is not done, to resume with, or of the last."""
    return next((i for i, own in enumerate(rounds) if not own.done(updates)), len(rounds) - 1)


def train(args: argparse.Namespace) -> None:
    """Train as the parsed command line says; `args.checkpoint` is the last round's afterwards.

    Raises DataError for unusable data or blocks, and the errors of `load_v3`.
    """
    rounds = rounds_of(args)
    if not args.resume and (there := [own for own in rounds if own.checkpoint.exists()]):
        raise DataError(f"{there[0].checkpoint} exists: go on with --resume, or name another")
    if args.rounds is not None and args.steps is None:
        args.steps = _ROUND
    first = first_round(rounds, args.steps) if args.resume else 0
    # A round that has not begun goes on from the state at the end of the one before.
    begun = not first or rounds[first].checkpoint.exists()
    args.checkpoint = rounds[first if begun else first - 1].checkpoint
    o = loop.options(args)
    bundle = load_v3(find_bundle(args.bundle), o.device, torch.float32)
    network = starting_network(bundle, args.teacher, o.device)
    if args.data is None:
        quiet(network)
    config = guided_sampling(bundle.config.recipe, args.guidance)
    teacher = Teacher.of(network, bundle, config, o.dtype)
    if args.guidance is None:
        teacher = replace(teacher, nothing=None)
    make = Source.of_scenes if args.data is None else Source.of_images
    source = make(bundle, o, args)
    try:
        network = pruning.pruned(network, args.prune)
    except ValueError as error:
        raise DataError(str(error)) from None
    student = Student(network)
    block_skips.skip_at_random(network, args.skip_blocks)
    if first:
        before = loop.load(rounds[first - 1].checkpoint, o.device)
        student.load_state_dict(before["ema"])
        teacher = teacher.succeeded_by(network, o.dtype)
        if not begun:
            source.data.load_state_dict(before["data"])
            loop.restore_noise(before, o.device)
    o = replace(o, record=o.record and source.recordable)
    for number, own in enumerate(rounds[first:], first):
        if number > first:
            teacher = teacher.succeeded_by(network, o.dtype)
        resume = o.resume and begun and number == first
        average = loop.fit(
            student,
            source.losses(partial(_loss, args, own, student, teacher)),
            replace(o, checkpoint=own.checkpoint, resume=resume),
            data=source.data,
            before=source.before,
        )
        student.load_state_dict(average.state_dict())
    args.checkpoint = rounds[-1].checkpoint


def _loss(
    args: argparse.Namespace, own: Round, student: Student, teacher: Teacher, draws: Draws
) -> loop.Loss:
    if own.steps is None:
        return guidance_loss(student, teacher, draws)
    loss = progressive_loss if args.progressive else consistency_loss
    return loss(student, teacher, draws, own.steps, reverse=not args.forward)


def _recipe(args: argparse.Namespace) -> Iterator[str]:
    yield "guidance=1"
    if args.rounds is not None:
        yield f"steps={args.rounds[-1]}"


def main() -> None:
    """Distil as the command line says."""
    p = parser()
    args = p.parse_args()
    if args.guidance is None and args.rounds is None:
        p.error("--guidance or --steps is needed")
    if args.rounds is None and (args.progressive or args.forward):
        p.error("--progressive and --forward go with --steps")
    options = ["--recipe", ",".join(_recipe(args))]
    options += ["--prune", ",".join(args.prune)] if args.prune else []
    denoiser.run(train, args, *options)


if __name__ == "__main__":
    command.run(main)
