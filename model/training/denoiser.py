"""Train the denoiser with a bundle's frozen VQGAN and text encoders.

    python -m model.training.denoiser runs/tiny --minutes 60
    python -m model.training.denoiser tiny --data my-images --steps 5000
    python -m model.training.denoiser tiny --data 'shards-{000..009}.tar' --steps 5000

It trains on captioned scenes, or with --data on your own images. The published objective: replace
each token by a random code with probability t, predict the original everywhere, and give a lower
weight to the positions that were not replaced. Letters: B rows, H W token grid.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.bundle import BundleV3, load_v3
from model.config import BundleV3Config, find_bundle
from model.networks.denoiser_v3 import Denoiser
from model.networks.vqgan_v3 import VQGAN
from model.training import block_skips, command, loop
from model.training.arguments import COUNT, SHARE, at_least, number_in
from model.training.captioned import DataError, open_collection
from model.training.data import Scenes
from model.training.decoding import Filters
from model.training.features import Examples, ExampleStream, Pool
from model.training.guides import Guided
from model.training.image_batches import ImageBatches
from model.training.judged import Neighbours, cross_entropy
from model.training.objective import (
    DROP_CLIP,
    attention,
    choose_positions,
    corrupt,
    draw_times,
    dropped_condition,
    gathered,
    in_products,
    position_weights,
    projection_of,
)
from model.training.stencils import Stencils
from model.training.vqgan import trained_vqgan

LABEL_SMOOTHING, SMOOTHING_BESIDE_NEAR = 0.1, 0.04
# This share of a row's positions is projected to the codebook and judged: the softmax would else
# cost as much as the network.
JUDGED = 0.25
# On scenes a few more. Positions in and around things are chosen FOCUS times as often as plain
# background, most of which is soon right.
JUDGED_OF_SCENES, FOCUS = 0.5, 4.0
# A byte's feature says all of its own thing and of the background (codes.py), so some bytes at
# random say it all, and a step costs less than with all of them. Each kind of step: its aspect,
# the number of bytes read of each caption, and the share of such steps.
_STEPS: tuple[tuple[int, int, float], ...] = (
    (0, 12, 0.47),
    (0, 24, 0.47),
    (1, 16, 0.03),
    (2, 16, 0.03),
)
# Images of 3:2 have half as many tokens again.
_BATCH_SHARES = (1.0, 2 / 3, 2 / 3)
# Uses of a scene, with other noise each time. A scene that is met often is learnt by heart, and
# encoding one takes twice as long as a step of it; where most tokens are known it need not be.
_MET, _MET_WITH_STENCILS = 16, 6
_ENCODED_AT_ONCE = 4  # batches
_ENCODED_FIRST = 32  # batches encoded before the first step
# On scenes, times are 1 − u^1.5 with u even in [0, 1), so that more of them are early: all is noise
# there, and only the caption tells what to draw.
EARLY = 1.5
# A network that can draw already forgets it at the rate at which a fresh one learns.
_RATE, _FINETUNING_RATE = 2e-3, 3e-4
# The batches of images that are read at a time, and the uses of each: features.ExampleStream.
_POOL, _REUSE = 8, 3


def token_loss(
    denoiser: Denoiser,
    x: Examples,
    t: Tensor,
    drop_clip: float = DROP_CLIP,
    judged: Tensor | None = None,
    near: Neighbours | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the objective at times t [B], and the accuracy at noised positions.

    judged: the positions [B, n] that count, by default random ones. drop_clip: the probability of
    dropping each of CLIP's embeddings. near: the codes near each code, if they share its labels;
    less is shared by all codes then.
    """
    noisy, noised = corrupt(x.tokens, t, denoiser.config.num_labels)
    judged = choose_positions(x.tokens, JUDGED) if judged is None else judged
    with in_products(denoiser), attention(t.device):
        condition = dropped_condition(denoiser, x, drop_clip)
        asked = gathered(denoiser.features(noisy, denoiser.times(t), condition), judged)
    target, touched = (grid.flatten(1).gather(1, judged).flatten() for grid in (x.tokens, noised))
    weights = position_weights(t, noised, judged)
    projection = projection_of(denoiser)
    smoothing = LABEL_SMOOTHING if near is None else SMOOTHING_BESIDE_NEAR
    value, right = cross_entropy(asked, projection, target, weights / len(target), smoothing, near)
    return value, (right & touched).sum() / touched.sum().clamp_min(1)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser: the arguments of all trainers, and the denoiser's own."""
    p = loop.parser(__doc__, name="denoiser", batch=32, lr=_RATE, minutes=60)
    p.add_argument(
        "bundle",
        nargs="?",
        help="name or path of the one whose VQGAN is trained already; for --data its encoders too",
    )
    p.add_argument(
        "--vqgan",
        type=Path,
        help="instead of a bundle: a VQGAN's checkpoint or weights, of the size in tiny.py",
    )
    p.set_defaults(lr=None)  # it depends on where the training begins
    add_data_arguments(p)
    block_skips.add_argument(p)
    p.add_argument(
        "--drop-clip",
        type=SHARE,
        default=DROP_CLIP,
        help=f"how often each of CLIP's embeddings is dropped ({DROP_CLIP:g})",
    )
    start = p.add_mutually_exclusive_group()
    start.add_argument(
        "--from-bundle",
        action="store_true",
        help="begin with the bundle's denoiser: what --data does",
    )
    start.add_argument(
        "--from-scratch", action="store_true", help="begin with a random denoiser: what scenes do"
    )
    return p


def add_data_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments that say which images a denoiser is trained on."""
    p.add_argument(
        "--data",
        help="folder of captioned images, or shards such as 'shards-{000..009}.tar'; else scenes",
    )
    p.add_argument(
        "--min-side",
        type=at_least(0),
        default=0,
        help="leave out images whose shorter side has fewer pixels (default 0)",
    )
    p.add_argument(
        "--max-aspect",
        type=number_in("at least 1", lambda value: value >= 1),
        default=math.inf,
        help="leave out images with a larger ratio of longer to shorter side (default none)",
    )
    p.add_argument(
        "--kept",
        type=COUNT,
        default=300_000,
        help="encoded scenes of each aspect held in memory (default 300000)",
    )
    p.add_argument(
        "--stencils",
        type=Path,
        help="tokens of things on plain backgrounds, from model.training.stencils with this VQGAN",
    )


def known_stencils(args: argparse.Namespace) -> Stencils | None:
    """Return the tokens of --stencils; None without it."""
    return None if args.stencils is None else Stencils.load(args.stencils)


def own_images(bundle: BundleV3, o: loop.Options, data: str, filters: Filters) -> ExampleStream:
    """Return encoded batches of the user's images, o.batch each.

    Raises DataError for unusable data.
    """
    collection = open_collection(data, o.data_seed)
    images = ImageBatches(
        collection,
        _POOL * o.batch,
        bundle.config.native_size,
        filters,
        seed=o.data_seed,
        threads=o.workers,
    )
    return ExampleStream(bundle, images, o.data_seed, pool=_POOL, reuse=_REUSE, dtype=o.dtype)


@dataclass
class Encoding:
    """The pools that scenes are drawn from, one for each aspect with scenes, and their growth."""

    vqgan: VQGAN
    pools: dict[int, Pool]
    batch: int
    steps: int = 0

    @classmethod
    def of(
        cls,
        config: BundleV3Config,
        vqgan: VQGAN,
        scenes: Scenes,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        *,
        sprites: bool = False,
        stencils: Stencils | None = None,
    ) -> Encoding:
        """Return an encoding without any encoded scenes.

        capacity: the largest number of images kept of each aspect. dtype: of the VQGAN's products.
        sprites: hold the things without their background too, for `guides`. stencils: known tokens.
        """
        present = [aspect for aspect, own in enumerate(scenes.of_aspect) if len(own)]
        return cls(
            vqgan,
            {
                aspect: Pool(
                    config, scenes, aspect, capacity, dtype, sprites=sprites, stencils=stencils
                )
                for aspect in present
            },
            batch,
        )

    @property
    def mixture(self) -> tuple[tuple[int, int, float], ...]:
        """Return the _STEPS of those aspects that have images."""
        return tuple(step for step in _STEPS if step[0] in self.pools)

    def begin(self, first: int = _ENCODED_FIRST) -> None:
        """Encode `first` batches of the square images, and a share of the others."""
        for aspect, pool in self.pools.items():
            wanted = min(self.batch * first // (1 if aspect == 0 else 8), pool.capacity)
            while pool.encoded < wanted:
                pool.grow(self.vqgan, self._at_once)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Return no files: every scene is usable."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which determines what the pools hold."""
        return {
            "steps": self.steps,
            "encoded": {aspect: pool.encoded for aspect, pool in self.pools.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Encode again what the pools held, but for the scenes that have been replaced since."""
        self.steps = state["steps"]
        for aspect, pool in self.pools.items():
            pool.restore(self.vqgan, state["encoded"][aspect], self._at_once)

    @property
    def _met(self) -> int:
        known = all(pool.stencils is not None for pool in self.pools.values())
        return _MET_WITH_STENCILS if known else _MET

    @property
    def _at_once(self) -> int:
        return min(_ENCODED_AT_ONCE * self.batch, 1024)

    def losses(self, of: Callable[[Pool, int, int], loop.Loss]) -> loop.Mixture:
        """Return a loss for each kind of step, with their shares.

        of: returns the loss of batches from a pool, given their size and the number of bytes read
        of each caption.
        """
        aspects, read, shares = zip(*self.mixture, strict=True)
        sizes = [round(self.batch * _BATCH_SHARES[aspect]) for aspect in aspects]
        pools = [self.pools[aspect] for aspect in aspects]
        return loop.Mixture(tuple(map(of, pools, sizes, read)), shares)

    def grow(self) -> None:
        """Encode more scenes before a step, if those encoded have been met often enough."""
        self.steps += 1
        for aspect, pool in self.pools.items():
            share = sum(share for own, _, share in _STEPS if own == aspect)
            if pool.encoded * self._met < self.steps * self.batch * share:
                pool.grow(self.vqgan, self._at_once)


def scene_loss(
    guided: Guided, pool: Pool, batch: int, bytes_read: int, drop_clip: float = DROP_CLIP
) -> loop.Loss:
    """Return the loss of random batches from a pool.

    bytes_read: the number of bytes read of each caption.
    """
    denoiser = guided.denoiser

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = pool.draw(batch, bytes_read)
        t = draw_times(batch, x.tokens.device, EARLY)
        judged = choose_positions(x.tokens, JUDGED_OF_SCENES, FOCUS, x.commonest)
        value, right = token_loss(denoiser, x, t, drop_clip, judged, guided.neighbours)
        more, figures = guided.loss(x.tokens, x.sprites)
        return value + more, {"tokens": value.detach(), "right": right.detach(), **figures}

    return loss


def scene_losses(guided: Guided, encoding: Encoding, drop_clip: float = DROP_CLIP) -> loop.Mixture:
    """Return a loss for each kind of step, with their shares."""
    return encoding.losses(
        lambda pool, batch, bytes_read: scene_loss(guided, pool, batch, bytes_read, drop_clip)
    )


def matrices_of(module: nn.Module) -> list[str]:
    """Return the names of the blocks' own projections, for Muon.

    The projections of the condition and of the time have few inputs; AdamW steps those.
    """
    return [
        name
        for name, p in module.named_parameters()
        if p.ndim == 2 and "_blocks." in name and "mapper" not in name
    ]


def train(args: argparse.Namespace) -> None:
    """Train as the parsed command line says.

    Raises DataError for unusable data, and the errors of `load_v3`.
    """
    from_bundle = args.from_bundle or (args.data is not None and not args.from_scratch)
    finetuning = args.data is not None and from_bundle
    if args.lr is None:
        args.lr = _FINETUNING_RATE if finetuning else _RATE
    o = loop.options(args)
    if args.data is not None:
        train_on_own(args, o, from_bundle, finetuning)
        return
    config, vqgan, kept = frozen(args, o)
    denoiser = Denoiser(config.denoiser).to(o.device)
    if args.from_bundle and kept is not None:
        denoiser.load_state_dict(kept)
    block_skips.skip_at_random(denoiser, args.skip_blocks)
    guided = Guided(denoiser, vqgan.vquantizer.codebook.weight).to(o.device)
    scenes = Scenes.load(args.corpus, o.device, o.data_seed)
    known = known_stencils(args)
    encoding = Encoding.of(
        config, vqgan, scenes, o.batch, args.kept, o.dtype, sprites=True, stencils=known
    )
    encoding.begin()
    mixture = scene_losses(guided, encoding, args.drop_clip)
    loop.fit(guided, mixture, o, data=encoding, matrices=matrices_of(guided), before=encoding.grow)


def frozen(
    args: argparse.Namespace, o: loop.Options
) -> tuple[BundleV3Config, VQGAN, dict[str, Tensor] | None]:
    """Return the configuration, the VQGAN, and the bundle's denoiser weights if there is a bundle.

    Raises DataError without a bundle and --vqgan.
    """
    if args.vqgan is not None:
        from model.training.assemble import tiny_config

        vqgan = trained_vqgan(args.vqgan).vqgan
        return tiny_config(), vqgan.to(o.device).eval().requires_grad_(False), None
    if args.bundle is None:
        raise DataError("a bundle or --vqgan is needed: tokens come from a trained VQGAN")
    bundle = load_v3(find_bundle(args.bundle), o.device, torch.float32)
    return bundle.config, bundle.vqgan, bundle.denoiser.state_dict()


def train_on_own(
    args: argparse.Namespace, o: loop.Options, from_bundle: bool, finetuning: bool
) -> None:
    """Train on the user's images, with a bundle's encoders.

    from_bundle: start from the bundle's denoiser. finetuning: step with AdamW alone. Raises
    DataError without a bundle, or for unusable data.
    """
    if args.bundle is None:
        raise DataError("--data needs a bundle, whose encoders read the captions")
    bundle = load_v3(find_bundle(args.bundle), o.device, torch.float32)
    denoiser = Denoiser(bundle.config.denoiser).to(o.device)
    if from_bundle:
        denoiser.load_state_dict(bundle.denoiser.state_dict())
    block_skips.skip_at_random(denoiser, args.skip_blocks)
    bundle = replace(bundle, denoiser=denoiser)  # frees the memory of the one it came with
    guided = Guided(denoiser, bundle.vqgan.vquantizer.codebook.weight).to(o.device)
    data = own_images(bundle, o, args.data, Filters(args.min_side, args.max_aspect))

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = next(data)
        value, right = token_loss(denoiser, x, draw_times(len(x.tokens), o.device), args.drop_clip)
        return value, {"right": right.detach()}

    # At a finetuning's rate and in its few steps AdamW gets further. Its batches are of many
    # lengths, and made on the host.
    matrices = () if finetuning else matrices_of(guided)
    loop.fit(guided, loss, replace(o, record=False), data=data, matrices=matrices)


def run(
    trainer: Callable[[argparse.Namespace], object], args: argparse.Namespace, *options: str
) -> None:
    """Train, and print how to assemble a bundle of the result. Raises the trainer's errors.

    Args:
        trainer: what writes `args.checkpoint`.
        args: of the command line.
        options: more of them for `model.training.assemble`.
    """
    trainer(args)
    if loop.rank() == 0:
        base = ("--base", args.bundle, "--denoiser", args.checkpoint)
        # Without a bundle, the other networks' checkpoints lie beside this one.
        command = (*(base if args.bundle else ("--runs", args.checkpoint.parent)), *options)
        print("to use it: python -m model.training.assemble NEW_BUNDLE", *command)


def main() -> None:
    """Train as the command line says."""
    run(train, parser().parse_args())


if __name__ == "__main__":
    command.run(main)
