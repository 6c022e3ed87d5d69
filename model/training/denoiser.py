"""Trains the denoiser on captioned scenes, or on your own pictures, with a bundle's frozen VQGAN and text encoders.

    python -m model.training.denoiser runs/tiny --minutes 60
    python -m model.training.denoiser tiny --data my-pictures --steps 5000
    python -m model.training.denoiser tiny --data 'shards-{000..009}.tar' --steps 5000

The published objective: replace each token by a random code with probability t, predict the original everywhere, and weigh down the
positions that were not touched.
"""

from __future__ import annotations

import argparse
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.bundle import BundleV3, load_v3
from model.config import find_bundle
from model.denoiser import Condition, Denoiser
from model.training import loop
from model.training.captioned import DataError, open_collection
from model.training.decoding import Filters
from model.training.features import Examples, ExampleStream, examples
from model.training.guides import Guided
from model.training.pictures import Pictures

LABEL_SMOOTHING = 0.1
# Published: CLIP text and image are each dropped 9 times in 10, on 600 million pictures. Ours sees a thousandth of that.
_DROP_CLIP = 0.5
# The prior's embeddings are not quite those of a picture; noise of this share keeps the denoiser from trusting them to the last digit.
_IMAGE_NOISE = 0.3
# Of a row's positions, this share is projected to the codebook and judged: the softmax would else cost as much as the network.
_JUDGED = 0.25
# On scenes twice as many, and those in and around things so many times as often as plain background, most of which is soon right.
_JUDGED_OF_SCENES, _FOCUS = 0.5, 4.0
# Every byte's feature of our own encoder knows the whole caption (byte_encoder.py), so a few at random say it all, and a step on scenes
# costs half as much as with all of them: projecting sixty bytes to keys and values is as much work as the network itself. How many changes,
# so that no number is expected.
_BYTES_READ = (8, 16, 32)
# On scenes, times are 1 − u^1.5 with u even in [0, 1), so that more of them are early: all is noise there, and the caption has to be heard.
_EARLY = 1.5
# A network that can draw already forgets it at the rate at which a fresh one learns.
_RATE, _FINETUNING_RATE = 2e-3, 3e-4
# How many batches of pictures are read at a time, and how often each is met: features.ExampleStream.
_POOL, _REUSE = 8, 3


def draw_times(count: int, device: torch.device, early: float = 1.0) -> Tensor:
    """Times [count] in (0, 1], evenly spread as published where early is 1, and the nearer to 1 the larger it is."""
    return 1 - torch.rand(count, device=device) ** early


def corrupt(tokens: Tensor, t: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, H, W] with random codes at a share t [B] of the positions, and where those are."""
    noised = torch.rand(tokens.shape, device=tokens.device) < t[:, None, None]
    return torch.where(noised, torch.randint_like(tokens, codes), tokens), noised


def some_bytes(x: Examples, count: int) -> Examples:
    """The examples with `count` of each caption's byte features at random, some of a short caption's twice: byt5 [B, count, D]."""
    chosen = x.mask.float().multinomial(count, replacement=True)
    byt5 = x.byt5.gather(1, chosen[..., None].expand(-1, -1, x.byt5.shape[-1]))
    return replace(x, byt5=byt5, mask=torch.ones_like(chosen, dtype=torch.bool))


def dropped_condition(denoiser: Denoiser, x: Examples, drop_clip: float = _DROP_CLIP) -> Condition:
    """The condition of a training batch, where each row keeps or loses its CLIP text and image tokens by masking their keys."""
    B, device, seq = len(x.tokens), x.tokens.device, denoiser.config.clip_seq_len
    image = x.clip_image + _IMAGE_NOISE * x.clip_image.std() * torch.rand(B, 1, device=device) * torch.randn_like(x.clip_image)
    condition = denoiser.condition(x.byt5, x.mask, x.clip_text, image)
    # The picture of an empty caption would tell what the missing text may not.
    kept = (torch.rand(B, 2, device=device) >= drop_clip) & torch.stack([torch.ones_like(x.empty), ~x.empty], dim=1)
    return replace(condition, mask=torch.cat([x.mask, kept.repeat_interleave(seq, dim=1)], dim=1))


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward pass takes twice the time of plain products."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def choose_positions(tokens: Tensor, share: float, focus: float = 1.0) -> Tensor:
    """Some positions of each row of tokens [B, H, W], at random: [B, n], as numbers in the flattened grid.

    focus: how many times as likely those are where a token, or one beside it, is not the picture's commonest. Both sides of an outline are
    in there: to choose by the token alone would teach that things are larger than they are.
    """
    B, H, W = tokens.shape
    commonest = tokens.flatten(1).mode(dim=1).values[:, None, None]
    busy = F.max_pool2d((tokens != commonest).float(), kernel_size=3, stride=1, padding=1)
    weight = 1 + (focus - 1) * busy.flatten(1)
    # The n largest of u^(1/w) are a draw without replacement with weights w (Efraimidis and Spirakis, 2006).
    return torch.rand(B, H * W, device=tokens.device).pow(1 / weight).topk(max(1, int(H * W * share)), dim=1).indices


def token_loss(
    denoiser: Denoiser, x: Examples, t: Tensor, drop_clip: float = _DROP_CLIP, judged: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the objective, share of judged noised tokens that are predicted right) at times t [B]. judged: positions [B, n], by default any."""
    noisy, noised = corrupt(x.tokens, t, denoiser.config.num_labels)
    condition = dropped_condition(denoiser, x, drop_clip)
    with _attention(t.device):
        features = denoiser.features(noisy, denoiser.times(t), condition).flatten(1, 2)  # [B, HW, c_out]
    judged = choose_positions(x.tokens, _JUDGED) if judged is None else judged

    def pick(grid: Tensor) -> Tensor:
        return grid.flatten(1).gather(1, judged)

    logits = denoiser.project(features.gather(1, judged[..., None].expand(-1, -1, features.shape[-1])))
    target, touched = pick(x.tokens), pick(noised)
    errors = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none", label_smoothing=LABEL_SMOOTHING)
    weights = torch.where(touched, 1.0, 1 - 0.7 * (1 - t[:, None]))
    right = ((logits.max(-1).indices == target) & touched).sum() / touched.sum().clamp_min(1)
    return (errors.view_as(weights) * weights).mean(), right


def parser() -> argparse.ArgumentParser:
    p = loop.parser(__doc__, name="denoiser", batch=32, lr=_RATE, minutes=60)
    p.add_argument("bundle", help="name or path of the one whose VQGAN, byte encoder and CLIP are trained already")
    p.add_argument("--data", help="folder of pictures with captions, or shards such as 'shards-{000..009}.tar'; without it, scenes")
    p.set_defaults(lr=None)  # it depends on where the training begins
    p.add_argument("--min-side", type=int, default=0, help="leave out pictures whose shorter side has fewer pixels")
    p.add_argument("--max-aspect", type=float, default=math.inf, help="leave out pictures whose longer side is so many times the shorter")
    p.add_argument("--drop-clip", type=float, default=_DROP_CLIP, help=f"how often each of CLIP's embeddings is dropped ({_DROP_CLIP:g})")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--from-bundle", action="store_true", help="begin with the bundle's denoiser: what --data does")
    start.add_argument("--from-scratch", action="store_true", help="begin with a random denoiser: what scenes do")
    return p


def batches(bundle: BundleV3, o: loop.Options, data: str | None, filters: Filters) -> ExampleStream:
    """Encoded batches of o.batch pictures each, of scenes if there is no other data. Raises DataError."""
    if data is None:
        return examples(bundle, o.batch, o.data_seed, dtype=o.dtype, workers=o.workers)
    collection = open_collection(data, o.data_seed)
    pictures = Pictures(collection, _POOL * o.batch, bundle.config.native_size, filters, seed=o.data_seed, threads=o.workers)
    return ExampleStream(bundle, pictures, o.data_seed, pool=_POOL, reuse=_REUSE, dtype=o.dtype)


def _matrices(module: nn.Module) -> list[str]:
    """The blocks' own projections; those of the condition and the time, whose inputs are few, are left to AdamW."""
    return [name for name, p in module.named_parameters() if p.ndim == 2 and "_blocks." in name and "mapper" not in name]


def train(args: argparse.Namespace) -> None:
    from_bundle = args.from_bundle or (args.data is not None and not args.from_scratch)
    finetuning = args.data is not None and from_bundle
    if args.lr is None:
        args.lr = _FINETUNING_RATE if finetuning else _RATE
    o = loop.options(args)
    bundle = load_v3(find_bundle(args.bundle), o.device, torch.float32)
    denoiser = Denoiser(bundle.config.denoiser).to(o.device)
    if from_bundle:
        denoiser.load_state_dict(bundle.denoiser.state_dict())
    bundle = replace(bundle, denoiser=denoiser)  # lets go of the memory of the one it came with
    guided = Guided(denoiser, bundle.vqgan.vquantizer.codebook.weight).to(o.device)
    data = batches(bundle, o, args.data, Filters(args.min_side, args.max_aspect))

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = next(data)
        if args.data is None:
            x = some_bytes(x, _BYTES_READ[int(torch.randint(len(_BYTES_READ), ()))])
            t, judged = draw_times(len(x.tokens), o.device, _EARLY), choose_positions(x.tokens, _JUDGED_OF_SCENES, _FOCUS)
        else:
            t, judged = draw_times(len(x.tokens), o.device), None
        value, right = token_loss(denoiser, x, t, args.drop_clip, judged)
        if args.data is not None:
            return value, {"right": right.detach()}
        more, figures = guided.loss(x.tokens)
        return value + more, {"tokens": value.detach(), "right": right.detach(), **figures}

    # At a finetuning's rate and in its few steps AdamW gets further.
    loop.fit(guided, loss, o, data=data, matrices=() if finetuning else _matrices(guided))


def main() -> None:
    args = parser().parse_args()
    try:
        train(args)
    except DataError as error:
        raise SystemExit(str(error)) from None
    if loop.rank() == 0:
        print(f"to use it: python -m model.training.assemble NEW_BUNDLE --base {args.bundle} --denoiser {args.checkpoint}")


if __name__ == "__main__":
    main()
