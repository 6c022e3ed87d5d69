"""Train the first judge, `detector.py`, on damaged renders of all kinds.

    python -m model.training.judge --minutes 20                # one core of a CPU

Needs the art (`make art`). The finder learns from whole images, one to four things of any kind,
size and place before any background; the namer from crops of single things, in boxes about as good
as the finder's. Both are laid out, rendered and damaged anew for every step, on the training
device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training import command, loop
from model.training.art import atlas
from model.training.augment import damaged
from model.training.backgrounds import paint
from model.training.detector import (
    CELL,
    CROP,
    NATIVE,
    ROOM,
    SIDE,
    WEIGHTS,
    Detector,
    Seen,
    gather,
    masked,
)
from model.training.kinds import NAMES_OF_KINDS, SHAPES, backgrounds_for, outline
from model.training.palette import COLOURS
from model.training.render import Layouts, render
from model.training.scenery import BACKGROUNDS

_M = 4
# Boxes (left, top, right, bottom) of the things, in shares of an image cut at (x, y) = (1, 1):
# the image is cut in two places at random, so that the halves have different sizes.
_WHOLE = (0, 0, 2, 2)
_LEFT = (0, 0, 1, 2)
_RIGHT = (1, 0, 2, 2)
_TOP, _BOTTOM = (0, 0, 2, 1), (0, 1, 2, 2)
_QUARTERS = ((0, 0, 1, 1), (1, 0, 2, 1), (0, 1, 1, 2), (1, 1, 2, 2))
_NONE = (-1, -1, -1, -1)
_ARRANGEMENTS: tuple[tuple[tuple[int, int, int, int], ...], ...] = (
    *[(_WHOLE, _NONE, _NONE, _NONE)] * 4,
    *[(_LEFT, _RIGHT, _NONE, _NONE)] * 2,
    *[(_TOP, _BOTTOM, _NONE, _NONE)] * 2,
    (_LEFT, _QUARTERS[1], _QUARTERS[3], _NONE),
    (_QUARTERS[0], _QUARTERS[1], _BOTTOM, _NONE),
    (_TOP, _QUARTERS[2], _QUARTERS[3], _NONE),
    *[_QUARTERS] * 5,
    (_NONE, _NONE, _NONE, _NONE),
)
_SMALLEST = 64.0  # pixels
_CLOSE_UPS = 0.3  # of the images of one thing
_CLOSE_CROPS = 0.15  # of the crops
_SAME = 0.15  # of the images: all things are of one kind
_TURN = 12.0  # degrees, at most
_TINT_JITTER = 8.0
_GAP = 4.0  # pixels between a thing and its box's edge
_ATLAS = 64  # pixels a side of the sprites that training draws
_IMAGES = 0.75  # whole images for each crop
_SHAPES = 0.1  # of the things are shapes, which have many colours
# The largest errors of a box, in shares: of its place, its side and its proportions.
_OFF = 0.08
_SCALE = 0.13
_ASPECT = 0.1


class Targets(NamedTuple):
    """The detector's right answers for N images of h × w cells with up to M things.

    heat: [N, h, w], 1 where a thing's middle lies and less around it. cells: [N, M] the middles'
    cells. boxes: [N, M, 4] as in `Seen`. kinds: [N, M]. there: [N, M] 0 or 1. background: [N].
    """

    heat: Tensor
    cells: Tensor
    boxes: Tensor
    kinds: Tensor
    there: Tensor
    background: Tensor


class Scatter(nn.Module):
    """Lay out random images on its device, all at once.

    seen: [S, B], 1 where a sprite can be seen before a background. sizes: [S, 2], the width and
    height of sprites one pixel long. colours: [12, 3]. arrangements: [A, M, 4].
    """

    seen: Tensor
    sizes: Tensor
    colours: Tensor
    arrangements: Tensor

    def __init__(self) -> None:
        super().__init__()
        seen = torch.zeros(len(NAMES_OF_KINDS), len(BACKGROUNDS))
        numbers = {name: i for i, name in enumerate(BACKGROUNDS)}
        for sprite in range(len(NAMES_OF_KINDS)):
            names = BACKGROUNDS if sprite < len(SHAPES) else backgrounds_for(sprite)
            seen[sprite, [numbers[name] for name in names]] = 1
        sizes = [outline(sprite, 1.0) for sprite in range(len(NAMES_OF_KINDS))]
        self.register_buffer("seen", seen, persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("colours", torch.tensor(list(COLOURS.values())), persistent=False)
        self.register_buffer("arrangements", torch.tensor(_ARRANGEMENTS), persistent=False)

    def forward(self, n: int) -> tuple[Layouts, Tensor]:
        """Return n layouts of 256 × 256 pixels, and boxes [N, M, 2] (width, height) in pixels."""
        device = self.sizes.device
        sprite, background = self._sprites(n)
        chosen = torch.randint(len(self.arrangements), (n,), device=device)
        corners = self.arrangements[chosen]  # [N, M, 4]
        cuts = torch.rand(n, 2, 3, device=device) * 0.24 + 0.38  # [N, axis, 3]
        cuts[..., 0], cuts[..., 2] = 0.0, 1.0
        cuts = NATIVE * cuts
        low, high = (_corner(cuts, corners[..., part : part + 2]) for part in (0, 2))
        room = high - low - 2 * _GAP
        sizes = self.sizes[sprite]
        largest = (room / sizes).amin(-1)
        length = largest * (1 - 0.65 * torch.rand(n, _M, device=device).square())
        length = length.clamp_min(_SMALLEST).minimum(largest)
        close = torch.rand(n, 1, device=device) < _CLOSE_UPS
        close = close & (corners[:, 1:2, 0] < 0)
        length = torch.where(close, NATIVE * (1.1 + 0.6 * torch.rand_like(length)), length)
        box = sizes * length[..., None]
        slack = (room - box).clamp_min(0) / 2
        slack = torch.where(close[..., None], 0.22 * NATIVE, slack)
        centre = (low + high) / 2 + slack * (2 * torch.rand(n, _M, 2, device=device) - 1)
        there = corners[..., 0] >= 0
        tint = self._tints(background)
        angle = _TURN * (2 * torch.rand(n, _M, device=device) - 1)
        angle = angle * (torch.rand(n, 1, device=device) < 0.5)
        layouts = Layouts(
            background=background.to(torch.int16),
            params=torch.rand(n, 8, device=device),
            sprite=torch.where(there, sprite, -1).to(torch.int16),
            centre=centre,
            length=length * (1 - 0.006 * angle.abs()),
            mirror=torch.rand(n, _M, device=device) < 0.4,
            angle=angle,
            tint=tint,
        )
        return layouts, box

    def _sprites(self, n: int) -> tuple[Tensor, Tensor]:
        """Return kinds [N, M] and a background [N] before which they can be seen."""
        device = self.seen.device
        first = torch.randint(len(self.seen), (n, 1), device=device)
        shapes = torch.randint(len(SHAPES), (n, 1), device=device)
        first = torch.where(torch.rand(n, 1, device=device) < _SHAPES, shapes, first)
        background = _drawn(self.seen[first[:, 0]], 1)[:, 0]
        others = _drawn(self.seen.T[background], _M - 1)
        same = torch.rand(n, 1, device=device) < _SAME
        return torch.cat([first, torch.where(same, first, others)], dim=1), background

    def _tints(self, background: Tensor) -> Tensor:
        """Return colours uint8 [N, M, 3], never that of a plain background."""
        n = len(background)
        device = background.device
        names = len(self.colours)
        step = torch.randint(1, names, (n, _M), device=device)
        colours = self.colours[(background[:, None] + step) % names].float()
        jitter = _TINT_JITTER * (2 * torch.rand(n, _M, 3, device=device) - 1)
        return (colours + jitter).clamp(0, 255).round().to(torch.uint8)

    def crops(self, n: int, atlas: Tensor) -> tuple[Tensor, Tensor]:
        """Return n crops [N, 3, 48, 48] of 0 … 1, boxed as the finder might, and their kinds."""
        device = self.sizes.device
        sprites, background = self._sprites(n)
        sprite, tint = sprites[:, 0], self._tints(background)[:, 0].float() / 255
        size = self.sizes[sprite]
        close = (torch.rand(n, device=device) < _CLOSE_CROPS)[:, None]
        # Lengths in sides of a box, or of a whole image that a close-up fills.
        length = 1 + _SCALE * _even(n, 1, device=device)
        length = torch.where(close, 1.35 + 0.25 * _even(n, 1, device=device), length)
        extent = size * length  # [N, 2]
        beyond = close & (extent > 1)
        off = _even(n, 2, device=device) * torch.where(beyond, 0.2, _OFF)
        share = extent.clamp_max(1) * (1 + _ASPECT * _even(n, 2, device=device))
        share = share / share.amax(1, keepdim=True) / ROOM
        pixels = _pasted(atlas[sprite], length[:, 0] / ROOM, off * 2 / ROOM)
        shape = (sprite < len(SHAPES))[:, None]
        ink = pixels[:, :3] * torch.where(shape, tint, 1.0)[..., None, None]
        crops = ink + (1 - pixels[:, 3:]) * self._behind(background)
        return masked(damaged(crops), share), sprite

    def _behind(self, background: Tensor) -> Tensor:
        """Return parts of backgrounds [N, 3, 48, 48] of 0 … 1."""
        n, device = len(background), background.device
        params = torch.rand(n, 8, device=device)
        painted = paint(background.to(torch.int16), params, SIDE, SIDE) / 255
        scale = 0.25 + 0.65 * torch.rand(n, 1, device=device)
        matrix = torch.zeros(n, 2, 3, device=device)
        matrix[:, 0, 0], matrix[:, 1, 1] = scale[:, 0], scale[:, 0]
        matrix[:, :, 2] = (1 - scale) * _even(n, 2, device=device)
        grid = F.affine_grid(matrix, [n, 3, CROP, CROP], align_corners=False)
        return F.grid_sample(painted, grid, align_corners=False)


def _even(*size: int, device: torch.device) -> Tensor:
    """Return numbers that are as likely anywhere in -1 … 1."""
    return 2 * torch.rand(*size, device=device) - 1


def _pasted(sprites: Tensor, length: Tensor, shift: Tensor) -> Tensor:
    """Return sprites [N, 4, S, S] as they look in crops [N, 4, 48, 48] of 0 … 1.

    length: [N], the sprite's side in crops' sides. shift: [N, 2] of its middle, in half sides. Some
    are turned and some mirrored.
    """
    n, device = len(sprites), sprites.device
    turn = torch.deg2rad(_TURN * _even(n, device=device)) * (torch.rand(n, device=device) < 0.5)
    flip = torch.where(torch.rand(n, device=device) < 0.4, -1.0, 1.0)
    cosine, sine = torch.cos(turn) / length, torch.sin(turn) / length
    x, y = -shift[:, 0], -shift[:, 1]
    across = torch.stack([cosine, sine, cosine * x + sine * y], dim=-1) * flip[:, None]
    down = torch.stack([-sine, cosine, cosine * y - sine * x], dim=-1)
    matrix = torch.stack([across, down], dim=1)
    grid = F.affine_grid(matrix, [n, 4, 2 * CROP, 2 * CROP], align_corners=False)
    sampled = F.grid_sample(sprites.float() / 255, grid, align_corners=False)
    return F.avg_pool2d(sampled, 2)


def _corner(cuts: Tensor, which: Tensor) -> Tensor:
    """Return the (x, y) [N, M, 2] of the cuts [N, 2, 3] with these numbers [N, M, 2]."""
    return torch.stack([cuts[:, i].gather(1, which[..., i].clamp_min(0)) for i in (0, 1)], dim=-1)


def _drawn(weights: Tensor, count: int) -> Tensor:
    """Draw `count` different columns per row of weights [N, K], without waiting for the device."""
    return (weights / torch.empty_like(weights).exponential_()).topk(count).indices


def targets(layouts: Layouts, box: Tensor, grid: tuple[int, int]) -> Targets:
    """Return the right answers for layouts and their boxes [N, M, 2], both in pixels."""
    h, w = grid
    there = (layouts.sprite >= 0).float()
    middle = layouts.centre / CELL
    cell = torch.stack(
        [middle[..., axis].floor().clamp(0, k - 1) for axis, k in ((0, w), (1, h))], dim=-1
    )
    extents = (box / CELL).clamp_min(0.5)
    boxes = torch.cat([middle - cell - 0.5, extents.log2()], dim=-1)
    y = torch.arange(h, device=middle.device)[:, None, None]
    x = torch.arange(w, device=middle.device)[None, :, None]
    spread = (extents.amin(-1) / 6).clamp(0.4, 1.5)[:, None, None]  # [N, 1, 1, M]
    apart = (x - cell[:, None, None, :, 0]).square() + (y - cell[:, None, None, :, 1]).square()
    heat = torch.exp(-apart / (2 * spread.square())) * there[:, None, None]
    return Targets(
        heat.amax(-1),
        (cell[..., 1] * w + cell[..., 0]).long(),
        boxes,
        layouts.sprite.long().clamp_min(0),
        there,
        layouts.background.long(),
    )


def place_loss(seen: Seen, right: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the finder's answers, and figures to show."""
    count = right.there.sum().clamp_min(1)
    logits, heat = seen.middles.float(), right.heat
    # CenterNet's focal loss: cells near a middle are half right.
    certain = logits.sigmoid()
    hit = F.logsigmoid(logits) * (1 - certain).square() * (heat >= 1)
    miss = F.logsigmoid(-logits) * certain.square() * (1 - heat).pow(4) * (heat < 1)
    middles = -(hit + miss).sum() / count
    boxes = gather(seen.boxes, right.cells).float()
    places = ((boxes - right.boxes).abs().sum(-1) * right.there).sum() / count
    background = F.cross_entropy(seen.background.float(), right.background)
    figures = {
        "middles": middles.detach(),
        "places": places.detach(),
        "backdrop": (seen.background.argmax(-1) == right.background).float().mean(),
    }
    return middles + 0.3 * places + 0.5 * background, figures


def scaled(layouts: Layouts, scale: float) -> Layouts:
    """Return the layouts for images of another size."""
    return replace(layouts, centre=layouts.centre * scale, length=layouts.length * scale)


def main() -> None:
    """Train as the command line says, and write the weights."""
    parser = loop.parser(__doc__, name="judge", batch=64, lr=3e-3, minutes=20, ema=0.995)
    parser.set_defaults(warmup=50)
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="the weights' file (default: the built-in one)"
    )
    o = loop.options(args := parser.parse_args())
    sprites = atlas(_ATLAS).to(o.device)
    scatter = Scatter().to(o.device)
    detector = Detector().train().to(o.device)
    detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = max(1, round(o.batch * _IMAGES))

    def drawn() -> tuple[Tensor, Targets, Tensor, Tensor]:
        layouts, box = scatter(images)
        whole = render(scaled(layouts, SIDE / NATIVE), sprites, SIDE, SIDE).float() / 255
        right = targets(layouts, box, (NATIVE // CELL, NATIVE // CELL))
        return damaged(whole), right, *scatter.crops(o.batch, sprites)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(o.device.type, enabled=False):
            whole, right, crops, kinds = drawn()
        last = torch.channels_last
        places, figures = place_loss(detector.finder(whole.contiguous(memory_format=last)), right)
        logits = detector.namer(crops.contiguous(memory_format=last)).float()
        figures["kind"] = (logits.argmax(-1) == kinds).float().mean()
        return places + F.cross_entropy(logits, kinds, label_smoothing=0.02), figures

    trained = loop.fit(detector, loss, o)
    assert isinstance(trained, Detector)
    trained.save(args.out)


if __name__ == "__main__":
    command.run(main)
