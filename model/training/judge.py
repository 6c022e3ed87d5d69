"""Trains the first judge, `detector.py`, on damaged renders of all kinds.

    python -m model.training.judge --minutes 30                # CPU, one core
    python -m model.training.judge --minutes 1.2 --batch 512   # a large GPU

Needs the art (`make art`). Pictures are laid out, rendered and damaged on the device that trains,
all of them anew: one to four things of any kind, size and place before any background.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training import loop
from model.training.art import atlas
from model.training.augment import damaged
from model.training.detector import CELL, SIDE, WEIGHTS, Detector, Seen
from model.training.kinds import NAMES_OF_KINDS, SHAPES, backgrounds_for, outline
from model.training.palette import COLOURS
from model.training.render import Layouts, render
from model.training.scenery import BACKGROUNDS

NATIVE = 2 * SIDE  # pixels a side of the pictures that layouts speak of
_M = 4
# Boxes (left, top, right, bottom) of the things, in shares of a picture cut at (x, y) = (1, 1):
# the picture is cut in two places at random, so that the halves have different sizes.
_WHOLE, _LEFT, _RIGHT = (0, 0, 2, 2), (0, 0, 1, 2), (1, 0, 2, 2)
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
_CLOSE_UPS = 0.1  # of the pictures of one thing
_SAME = 0.15  # of the pictures: all things are of one kind
_TURN = 12.0  # degrees, at most
_TINT_JITTER = 8.0
_GAP = 4.0  # pixels between a thing and its box's edge


class Targets(NamedTuple):
    """The detector's right answers for N pictures of h × w cells with up to M things.

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
    """Lays out random pictures on its device, all at once.

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
        first = torch.randint(len(self.seen), (n, 1), device=self.seen.device)
        background = _drawn(self.seen[first[:, 0]], 1)[:, 0]
        others = _drawn(self.seen.T[background], _M - 1)
        same = torch.rand(n, 1, device=self.seen.device) < _SAME
        return torch.cat([first, torch.where(same, first, others)], dim=1), background

    def _tints(self, background: Tensor) -> Tensor:
        """Return colours uint8 [N, M, 3], never that of a plain background."""
        n, device, names = len(background), background.device, len(self.colours)
        step = torch.randint(1, names, (n, _M), device=device)
        colours = self.colours[(background[:, None] + step) % names].float()
        jitter = _TINT_JITTER * (2 * torch.rand(n, _M, 3, device=device) - 1)
        return (colours + jitter).clamp(0, 255).round().to(torch.uint8)


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


def loss(detector: Detector, seen: Seen, right: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the questions' losses, and figures to show."""
    count = right.there.sum().clamp_min(1)
    logits, heat = seen.middles.float(), right.heat
    # CenterNet's focal loss: cells near a middle are half right.
    certain = logits.sigmoid()
    hit = F.logsigmoid(logits) * (1 - certain).square() * (heat >= 1)
    miss = F.logsigmoid(-logits) * certain.square() * (1 - heat).pow(4) * (heat < 1)
    middles = -(hit + miss).sum() / count
    boxes = _at(seen.boxes, right.cells).float()
    places = ((boxes - right.boxes).abs().sum(-1) * right.there).sum() / count
    answers = detector.kinds(_at(seen.cells, right.cells)).float()
    kinds = F.cross_entropy(
        answers.flatten(0, 1), right.kinds.flatten(), reduction="none", label_smoothing=0.02
    )
    kinds = (kinds * right.there.flatten()).sum() / count
    background = F.cross_entropy(seen.background.float(), right.background)
    named = ((answers.argmax(-1) == right.kinds) * right.there).sum() / count
    figures = {
        "kind": named.detach(),
        "middles": middles.detach(),
        "places": places.detach(),
        "backdrop": (seen.background.argmax(-1) == right.background).float().mean(),
    }
    return middles + 0.3 * places + kinds + 0.5 * background, figures


def _at(grid: Tensor, cells: Tensor) -> Tensor:
    """Return what a grid [N, h, w, D] holds at cells [N, M] → [N, M, D]."""
    return grid.flatten(1, 2).gather(1, cells[..., None].expand(-1, -1, grid.shape[-1]))


def halved(layouts: Layouts) -> Layouts:
    """Return the layouts for pictures of half the size."""
    return replace(layouts, centre=layouts.centre / 2, length=layouts.length / 2)


def main() -> None:
    parser = loop.parser(__doc__, name="judge", batch=64, lr=2e-3, minutes=30, ema=0.998)
    parser.set_defaults(warmup=60)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    o = loop.options(args := parser.parse_args())
    sprites = atlas(SIDE).to(o.device)
    scatter = Scatter().to(o.device)
    detector = Detector().train().to(o.device)
    detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        layouts, box = scatter(o.batch)
        with torch.autocast(o.device.type, enabled=False):
            pictures = render(halved(layouts), sprites, SIDE, SIDE).float() / 255
            pictures = damaged(pictures).contiguous(memory_format=torch.channels_last)
        seen = detector(pictures)
        grid = (seen.middles.shape[1], seen.middles.shape[2])
        return loss(detector, seen, targets(layouts, box, grid))

    trained = loop.fit(detector, step, o)
    assert isinstance(trained, Detector)
    trained.save(args.out)


if __name__ == "__main__":
    main()
