"""Define the second judge: no network, but every kind's template laid over an image's regions.

    judge = Templates(atlas())
    judge.read(images)  # uint8 [N, H, W, 3] → list[Reading]

The background is the plain colour or the painted scene that leaves least to explain
(`backdrops.py`), things are regions unlike it, and a region's kind is the template that explains
its pixels best when it is pasted over the background. Nothing is trained, and no recipe or reward
is chosen by it.

Letters: N images, R regions, T templates, C pixels a side and P pixels of the cells in which
regions and templates are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.backdrops import Backdrops
from model.training.checker import Found, Reading
from model.training.close_ups import CloseUp, CloseUps
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.palette import NAMES, nearest
from model.training.regions import (
    LEAST,
    PARTS,
    SIDE,
    Group,
    Labels,
    candidates,
    cropped,
    difference,
    partition,
    regions,
    smooth,
)
from model.training.scenery import BACKGROUNDS

_CELL = 24  # pixels a side in which all templates are compared; the last few in twice as many
_MARGIN = 0.06  # of a cell's side that is left free on every side
_ANGLES = (0.0, -8.0, 8.0)  # degrees by which templates are turned
_UNEXPLAINED = 0.6  # share left over from which a region before a painted scene is part of it
_CLOSE = 0.6  # share of an image left over below which it is a close-up
_BARE = 0.01  # share of a close-up that shows enough of its background
_EVEN = 0.1  # how uneven that may be, of 0 … 1, and still be a plain colour
_SHORTLIST, _LAST = 16, 6  # templates that are compared more closely, twice
_SHIFTS = tuple((x, y) for x in (0.0, -1.0, 1.0) for y in (0.0, -1.0, 1.0))  # in pixels of a cell
_SCALES = (0.94, 1.06)
_EDGES = 2.0  # weight of edges beside colours in the last comparison
_ANY_COLOUR = 1.3  # how much closer a shape must be, since its colour is free
_BATCH = 64


@dataclass(frozen=True)
class Views:
    """N images [N, 3, H, W] of 0 … 1, their backgrounds alike, and regions' numbers [N, H, W]."""

    images: Tensor
    behind: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Cells:
    """R squares cut out of images and of their backgrounds, [R, 3, C, C] of 0 … 1 each."""

    pixels: Tensor
    behind: Tensor

    @property
    def contrast(self) -> Tensor:
        """Return the difference of pixels and background, [R, 3, P]."""
        return (self.pixels - self.behind).flatten(2)

    def halved(self) -> Cells:
        """Return the cells with half as many pixels a side."""
        return Cells(F.avg_pool2d(self.pixels, 2), F.avg_pool2d(self.behind, 2))


class Templates:
    """Compare images with all sprites: upright and turned, each also mirrored.

    atlas: `art.atlas()`, on the device that compares.
    """

    def __init__(self, atlas: Tensor) -> None:
        self.device = atlas.device
        self.fine = sprite_cells(atlas)  # [T, 4, 2 C, 2 C]
        copies = len(self.fine) // len(atlas)
        self.kinds = torch.arange(len(atlas), device=self.device).repeat_interleave(copies)
        coarse = F.avg_pool2d(self.fine, 2).flatten(2)  # [T, 4, P]
        ink, opacity = coarse[:, :3], coarse[:, 3]
        self.shapes = opacity[: copies * len(SHAPES)]  # the first t templates
        parts = [ink.flatten(1), opacity, (ink * opacity[:, None]).flatten(1), opacity.square()]
        self.vectors = torch.cat(parts, dim=1)  # [T, 8 P]
        self.energy = ink.square().sum((1, 2))  # [T]
        self.backdrops = Backdrops(self.device)
        self.close_ups = CloseUps(atlas)

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Reading]:
        """Return what images uint8 [N, H, W, 3] of one size show."""
        return [reading for part in images.split(_BATCH) for reading in self._read(part)]

    def _read(self, images: Tensor) -> list[Reading]:
        height, width = images.shape[1:3]
        planes = images.to(self.device).permute(0, 3, 1, 2).float() / 255
        scale = SIDE / min(height, width)
        size = (round(height * scale), round(width * scale))
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
        numbers, behind = self.backdrops.find(planes)
        painted = torch.tensor([number >= len(NAMES) for number in numbers], device=self.device)
        fields = difference(planes, behind, painted).cpu().numpy()
        labels = [regions(field) for field in fields]
        views = Views(planes, behind, torch.from_numpy(np.stack(labels)).to(self.device))
        near = [i for i, some in enumerate(labels) if height == width and cropped(some)]
        close = {i: self.close_ups.find(planes[i]) for i in near}
        close = {i: one for i, one in close.items() if one.left < _CLOSE}
        groups = [group for group in self._things(views, labels) if group.image not in close]
        things: list[list[Found]] = [[] for _ in numbers]
        for i, one in close.items():
            things[i].append(_close_up(one))
            if one.bare > _BARE and one.uneven < _EVEN:
                numbers[i] = NAMES.index(nearest([255 * level for level in one.behind]))
        for group, (kind, left, colour) in zip(groups, self._match(views, groups), strict=True):
            if numbers[group.image] < len(NAMES) or left < _UNEXPLAINED:
                found = _found(group, NAMES_OF_KINDS[kind], left, colour, size)
                things[group.image].append(found)
        return [
            Reading(BACKGROUNDS[number], tuple(sorted(some, key=_certainty)), (height, width))
            for number, some in zip(numbers, things, strict=True)
        ]

    # ── regions → things ──────────────────────────────────────────────────────────────────────────

    def _things(self, views: Views, labels: Sequence[Labels]) -> list[Group]:
        """Return the groups of regions that explain images best as one thing each."""
        groups = [list(candidates(i, numbers)) for i, numbers in enumerate(labels)]
        flat = [group for some in groups for group in some]
        if not flat:
            return []
        cells = self._cells(views, flat).halved()
        area = torch.tensor([group.side**2 for group in flat], device=self.device)
        left = (self._left_over(cells).clamp_min(0).amin(1) * area).tolist()
        energy = (cells.contrast.square().sum((1, 2)) * area).tolist()
        chosen, at = list[Group](), 0
        for some in groups:
            end = at + len(some)
            chosen += partition(some, left[at:end], energy[at:end])
            at = end
        return [group for group in chosen if group.area >= LEAST * SIDE**2]

    # ── comparing ─────────────────────────────────────────────────────────────────────────────────

    def _cells(self, views: Views, groups: Sequence[Group], jitter: Tensor | None = None) -> Cells:
        """Cut out the squares around groups [R, 3, 2 C, 2 C]; of other things only background.

        jitter: [R, 3], a shift (x, y) in pixels of a cell of C, and a scale.
        """
        if jitter is None:
            jitter = torch.tensor([0.0, 0.0, 1.0], device=self.device).expand(len(groups), 3)
        boxes = torch.tensor([group.box for group in groups], device=self.device).float()
        side = (boxes[:, 2:] - boxes[:, :2]).amax(1) / (1 - 2 * _MARGIN) * jitter[:, 2]
        middle = (boxes[:, 2:] + boxes[:, :2]) / 2 + side[:, None] / _CELL * jitter[:, :2]
        steps = (torch.arange(2 * _CELL, device=self.device) + 0.5) / (2 * _CELL) - 0.5
        along = middle[..., None] + side[:, None, None] * steps  # [R, axis, 2 C]
        height, width = views.images.shape[-2:]
        along = along * 2 / along.new_tensor([width, height])[:, None] - 1
        n = len(steps)
        grid = torch.stack(
            [along[:, 0, None, :].expand(-1, n, -1), along[:, 1, :, None].expand(-1, -1, n)], dim=-1
        )
        index = torch.tensor([group.image for group in groups], device=self.device)
        own = torch.zeros(len(groups), PARTS + 1, dtype=torch.bool)
        for row, group in zip(own, groups, strict=True):
            row[[0, *group.regions]] = True
        labels = views.labels[index]
        mine = own.to(self.device).gather(1, labels.flatten(1).long()).view_as(labels)
        behind = views.behind[index]
        pixels = torch.where(mine[:, None], views.images[index], behind)
        both = torch.cat([pixels, behind], dim=1)
        cut = F.grid_sample(both, grid, padding_mode="border", align_corners=False)
        return Cells(cut[:, :3], cut[:, 3:])

    def _left_over(self, cells: Cells, chosen: Tensor | None = None) -> Tensor:
        """Return what templates leave over of the energy of cells: [R, T].

        chosen: templates of each region's own [R, t]. A template of ink I and opacity a before a
        background b has the contrast I - a b; the square of a cell's contrast less that is a sum of
        products, each of something of the cell's and something of the template's.
        """
        contrast, behind = cells.contrast, cells.behind.flatten(2)
        parts = [-2 * contrast.flatten(1), 2 * (contrast * behind).sum(1)]
        parts += [-2 * behind.flatten(1), behind.square().sum(1)]
        own = torch.cat(parts, dim=1)  # [R, 8 P]
        shapes = self._shapes_left_over(cells)[0]
        if chosen is None:
            products = own @ self.vectors.T + self.energy
        else:
            products = torch.einsum("rd,rtd->rt", own, self.vectors[chosen]) + self.energy[chosen]
        objects = contrast.square().sum((1, 2))[:, None] + products
        shapes, count = _ANY_COLOUR * shapes, shapes.shape[1]
        if chosen is None:
            return torch.cat([shapes, objects[:, count:]], dim=1)
        return torch.where(chosen < count, shapes.gather(1, chosen.clamp_max(count - 1)), objects)

    def _shapes_left_over(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Return what shapes of the best colour leave over [R, t], and that colour [R, t, 3]."""
        contrast = cells.contrast
        behind = cells.behind.flatten(2)
        opacity = self.shapes
        square = opacity.square()
        energy = contrast.square().sum((1, 2))[:, None] + behind.square().sum(1) @ square.T
        energy = energy + 2 * (contrast * behind).sum(1) @ opacity.T
        size = square.sum(1)
        ink = torch.einsum("rcp,tp->rtc", contrast, opacity)
        ink = ink + torch.einsum("rcp,tp->rtc", behind, square)
        colour = (ink / size[:, None]).clamp(0, 1)
        explained = 2 * ink * colour - colour.square() * size[:, None]
        return energy - explained.sum(-1), colour

    def _match(
        self, views: Views, groups: Sequence[Group]
    ) -> list[tuple[int, float, Sequence[float]]]:
        """Return each group's kind, the share left over, and its RGB of 0 … 255 as a shape."""
        if not groups:
            return []
        cells = self._cells(views, groups).halved()
        chosen = self._left_over(cells).topk(_SHORTLIST, largest=False).indices  # [R, t]
        jitter, left = self._aligned(views, groups, chosen)
        last = chosen.gather(1, left.topk(_LAST, largest=False).indices)
        cells = self._cells(views, groups, jitter)
        _, colours = self._shapes_left_over(cells.halved())
        apart, energy = self._apart(cells, last, colours)
        apart = torch.where(last < len(self.shapes), apart * _ANY_COLOUR, apart)
        rows = torch.arange(len(groups), device=self.device)
        winner = last[rows, apart.argmin(1)]
        share = (apart.amin(1) / energy.clamp_min(1e-6)).tolist()
        shape = winner.clamp_max(colours.shape[1] - 1)
        rgb = (colours[rows, shape] * 255).tolist()
        return list(zip(self.kinds[winner].tolist(), share, rgb, strict=True))

    def _aligned(
        self, views: Views, groups: Sequence[Group], chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return how the groups' squares must be moved for one of the chosen templates to fit best.

        chosen: templates [R, t]. Returns [R, 3] as `_cells` takes it, and what each template leaves
        over in its own best place [R, t].
        """
        upright = torch.tensor([0.0, 0.0, 1.0], device=self.device)
        jitter = upright.repeat(len(groups), 1)
        left = torch.full(chosen.shape, torch.inf, device=self.device)

        def attempt(tried: Tensor) -> None:
            now = self._left_over(self._cells(views, groups, tried).halved(), chosen)
            better = now.amin(1) < left.amin(1)
            jitter.copy_(torch.where(better[:, None], tried, jitter))
            torch.minimum(left, now, out=left)

        for x, y in _SHIFTS:
            attempt(torch.tensor([x, y, 1.0], device=self.device).expand_as(jitter))
        shifted = jitter.clone()
        for scale in _SCALES:
            attempt(torch.cat([shifted[:, :2], torch.full_like(shifted[:, 2:], scale)], dim=1))
        return jitter, left

    def _apart(self, cells: Cells, chosen: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far cells are from templates [R, t] pasted before their backgrounds.

        By colours and by edges, and [R] alike from the backgrounds alone.
        """
        sprites = self.fine[chosen]  # [R, t, 4, 2 C, 2 C]
        is_shape = (chosen < colours.shape[1])[..., None, None, None]
        index = chosen.clamp_max(colours.shape[1] - 1)[..., None].expand(-1, -1, 3)
        tint = colours.gather(1, index)[..., None, None]
        ink = torch.where(is_shape, sprites[:, :, :3] * tint, sprites[:, :, :3])
        pasted = ink + (1 - sprites[:, :, 3:]) * cells.behind[:, None]
        return (
            _distance(pasted, cells.pixels[:, None]),
            _distance(cells.behind, cells.pixels),
        )


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared difference of colours and edges [...] of images [..., 3, H, W]."""
    apart = smooth(one - other)
    down, across = apart.diff(dim=-2), apart.diff(dim=-1)
    edges = down.square().sum((-3, -2, -1)) + across.square().sum((-3, -2, -1))
    return apart.square().sum((-3, -2, -1)) + _EDGES * edges


def _found(
    group: Group, kind: str, left: float, colour: Sequence[float], size: tuple[int, int]
) -> Found:
    x0, y0, x1, y1 = group.box
    height, width = size
    return Found(
        kind,
        nearest(colour) if kind in SHAPES else None,
        ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height),
        ((x1 - x0) / min(size), (y1 - y0) / min(size)),
        max(0.0, 1 - left),
    )


def _close_up(one: CloseUp) -> Found:
    return Found(NAMES_OF_KINDS[one.kind], None, one.centre, (one.length,) * 2, 1 - one.left)


def _certainty(found: Found) -> float:
    return -found.score


# ── sprites → templates ───────────────────────────────────────────────────────────────────────────


def sprite_cells(atlas: Tensor) -> Tensor:
    """Return the sprites' templates [T, 4, 2 C, 2 C], premultiplied by alpha, of 0 … 1.

    A kind's are one after the other: every angle upright and mirrored. Each is fitted to its cell
    by its box, as images' regions are.
    """
    planes = atlas.float() / 255
    turned = [
        fitted(sprite)
        for angle in _ANGLES
        for flip in (1.0, -1.0)
        for sprite in [_turned(planes, angle, flip)]
    ]
    return torch.stack(turned, dim=1).flatten(0, 1)


def _turned(planes: Tensor, angle: float, flip: float) -> Tensor:
    """Return sprites [S, 4, H, W] turned by degrees, mirrored for -1, with room around them."""
    turn = np.deg2rad(angle)
    cosine, sine = 1.25 * float(np.cos(turn)), 1.25 * float(np.sin(turn))
    matrix = planes.new_tensor([[flip * cosine, flip * sine, 0], [-sine, cosine, 0]])
    grid = F.affine_grid(matrix.expand(len(planes), 2, 3), list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, align_corners=False)


def fitted(sprites: Tensor) -> Tensor:
    """Scale sprites [S, 4, H, W] so that their boxes fill a cell but for its margin."""
    n, _, height, width = sprites.shape
    solid = sprites[:, 3] > 0.3
    boxes = []
    for extent, dim in ((width, 1), (height, 2)):
        there = solid.any(dim)  # [S, extent]
        places = torch.arange(extent, device=sprites.device)
        low = torch.where(there, places, extent).amin(1)
        high = torch.where(there, places + 1, 0).amax(1)
        boxes.append((low.float(), high.float()))
    (left, right), (top, bottom) = boxes
    side = torch.maximum(right - left, bottom - top) / (1 - 2 * _MARGIN)
    matrix = sprites.new_zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = side / width, side / height
    matrix[:, 0, 2], matrix[:, 1, 2] = (left + right) / width - 1, (top + bottom) / height - 1
    grid = F.affine_grid(matrix, [n, 4, 4 * _CELL, 4 * _CELL], align_corners=False)
    return F.avg_pool2d(F.grid_sample(sprites, grid, align_corners=False), 2)
