"""Paint the backgrounds of the synthetic images, in batches and on any device.

They are plain colours and simple scenes of smooth gradients. Lengths are in units of the image's
shorter side, y downwards. Dots and windows sit in the middle of a token, a sixteenth of that side,
so that the VQGAN sees few different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from model.training.palette import COLOURS, NAMES
from model.training.scenery import BACKGROUNDS, GROUND, HORIZON, SCENES

__all__ = ["BACKGROUNDS", "GROUND", "HORIZON", "PARAMETERS", "SCENES", "VARIANTS", "paint"]

PARAMETERS = 8  # random numbers a background takes
VARIANTS = 64  # images of each scene

_WOBBLE = 6.0  # levels by which a colour varies
_TOKENS = 16  # a unit
_PATTERN = 24  # tokens a side after which dots repeat

Colour = tuple[int, int, int]
_WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True)
class _Sheet:
    """n images in the making.

    p: their numbers of 0…1 `[n,8]`; x `[1,1,1,W]` and y `[1,1,H,1]`: the middles of the pixels;
    width and height: of the image, in units; unit: pixels a unit.
    """

    p: Tensor
    x: Tensor
    y: Tensor
    width: float
    height: float
    unit: int

    def number(self, i: int, low: float, high: float) -> Tensor:
        """Return parameter i, spread from low to high: `[n,1,1,1]`."""
        return low + (high - low) * self.p[:, i, None, None, None]

    def colour(self, colour: Colour) -> Tensor:
        """Return a colour that varies a little: `[n,3,1,1]`."""
        return (self.p.new_tensor(colour) + _WOBBLE * (2 * self.p[:, :3] - 1))[:, :, None, None]

    def gradient(self, stops: Sequence[tuple[float, Colour]]) -> Tensor:
        """Return colours from top to bottom, each stop at a share of the height: `[n,3,H,1]`."""
        where = self.y / self.height
        result = self.colour(stops[0][1]).expand(-1, -1, where.shape[2], -1)
        for (y0, _), (y1, colour) in pairwise(stops):
            result = torch.lerp(result, self.colour(colour), ((where - y0) / (y1 - y0)).clamp(0, 1))
        return result

    def edge(self, inside: Tensor) -> Tensor:
        """Return a cover of 0…1 from how far each pixel lies inside an outline, in units."""
        return (inside * self.unit + 0.5).clamp(0, 1)

    def disc(
        self, x: Tensor | float, y: Tensor | float, radius: Tensor | float, squash: float = 1.0
    ) -> Tensor:
        """Return the cover of a disc, or of an ellipse `squash` times as high as wide."""
        return self.edge(radius - ((self.x - x) ** 2 + ((self.y - y) / squash) ** 2).sqrt())

    def hills(self, level: float, swing: float, waves: float, phase: Tensor) -> Tensor:
        """Return the cover of hills.

        Their ridge swings by `swing` units around a share `level` of the height.
        """
        turns = 6.2832 * (waves * self.x / self.width + phase)
        ridge = level * self.height + swing * (
            0.7 * torch.sin(turns) + 0.3 * torch.sin(2 * turns + 1)
        )
        return self.edge(self.y - ridge)

    def cloud(self, x: Tensor, y: Tensor, size: Tensor | float) -> Tensor:
        """Return the cover of a cloud: four discs over a flat bottom at y."""
        parts = ((-0.55, 0.0, 0.3), (-0.15, -0.18, 0.42), (0.3, -0.08, 0.36), (0.65, 0.06, 0.24))
        discs = [
            radius * size - torch.hypot(self.x - x - dx * size, self.y - y - dy * size)
            for dx, dy, radius in parts
        ]
        inside = torch.stack(discs).amax(dim=0)
        return self.edge(torch.minimum(inside, y + 0.12 * size - self.y))

    def dots(self, radius: float, every: int) -> Tensor:
        """Return the cover of dots in the middle of about one of `every` tokens."""
        generator = torch.Generator().manual_seed(every)
        pattern = (
            (torch.rand(_PATTERN, _PATTERN, generator=generator) * every)
            .long()
            .eq(0)
            .to(self.p.device)
        )
        down, right = (self.y * _TOKENS).long(), (self.x * _TOKENS).long()
        shift = (self.p[:, 6:8] * _PATTERN).long()[:, :, None, None]
        chosen = pattern[(down + shift[:, :1]) % _PATTERN, (right + shift[:, 1:]) % _PATTERN]
        return chosen * self.disc((right + 0.5) / _TOKENS, (down + 0.5) / _TOKENS, radius)


def _over(image: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    return image + cover * (colour - image)


def _plain(sheet: _Sheet, name: str) -> Tensor:
    return sheet.colour(COLOURS[name])


def _day_sky(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (64, 150, 236)), (1, (186, 224, 252))])
    for i, (level, size) in enumerate(((0.2, 0.34), (0.55, 0.24), (0.86, 0.4))):
        y = s.number(7 - i, level - 0.06, level + 0.06) * s.height
        sky = _over(sky, s.cloud(s.number(3 + i, 0, s.width), y, size), s.colour(_WHITE))
    return sky


def _sunset(s: _Sheet) -> Tensor:
    sky = s.gradient(
        [(0, (96, 56, 140)), (0.35, (214, 88, 120)), (0.6, (250, 142, 72)), (0.78, (255, 204, 96))]
    )
    sun = s.disc(s.number(3, 0.25, 0.75) * s.width, 0.74 * s.height, 0.17)
    sky = _over(sky, sun, s.colour((255, 238, 150)))
    return _over(
        sky,
        s.hills(0.8, 0.03, 1.2, s.number(4, 0, 1)),
        s.gradient([(0.76, (92, 40, 84)), (1, (52, 24, 64))]),
    )


def _starry_night(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (10, 14, 58)), (0.85, (52, 62, 140))])
    sky = _over(sky, s.dots(0.0086, 12), s.colour((252, 246, 214)))
    x, y = s.number(3, 0.14, 0.86) * s.width, 0.16
    moon = s.disc(x, y, 0.09) * (1 - s.disc(x + 0.045, y - 0.02, 0.075))
    sky = _over(sky, moon, s.colour((252, 238, 178)))
    return _over(sky, s.hills(0.88, 0.04, 1.3, s.number(4, 0, 1)), s.colour((14, 18, 44)))


def _sea(s: _Sheet) -> Tensor:
    horizon = HORIZON["sea"] or 0
    sky = s.gradient([(0, (116, 196, 246)), (horizon, (222, 242, 252))])
    water = s.gradient([(horizon, (36, 128, 204)), (1, (8, 62, 150))])
    depth = (s.y / s.height - horizon).clamp(min=0)
    swell = torch.sin(
        90 * depth.sqrt()
        + 1.5 * torch.sin(9 * s.x + 6.2832 * s.number(3, 0, 1))
        + 6.2832 * s.number(4, 0, 1)
    )
    water = water + 16 * (swell - 0.3).clamp(min=0)
    return _over(sky, s.edge(s.y - horizon * s.height), water)


def _meadow(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (110, 190, 250)), (0.6, (214, 240, 252))])
    sky = _over(
        sky,
        s.cloud(s.number(3, 0, s.width), s.number(4, 0.14, 0.26) * s.height, 0.24),
        s.colour(_WHITE),
    )
    sky = _over(sky, s.hills(0.52, 0.05, 1.0, s.number(5, 0, 1)), s.colour((142, 204, 92)))
    return _over(
        sky,
        s.hills(0.62, 0.03, 0.8, s.number(6, 0, 1)),
        s.gradient([(0.58, (108, 186, 66)), (1, (58, 138, 44))]),
    )


def _desert(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (250, 206, 140)), (0.55, (255, 238, 204))])
    sky = _over(
        sky, s.disc(s.number(3, 0.15, 0.85) * s.width, 0.18, 0.09), s.colour((255, 250, 226))
    )
    sky = _over(sky, s.hills(0.52, 0.06, 1.1, s.number(4, 0, 1)), s.colour((226, 164, 92)))
    return _over(
        sky,
        s.hills(0.66, 0.05, 0.9, s.number(5, 0, 1)),
        s.gradient([(0.6, (240, 188, 112)), (1, (206, 140, 70))]),
    )


def _snow(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (140, 170, 206)), (0.6, (206, 220, 236))])
    for i in range(3):
        x = (s.number(3 + i, 0, 0.3) + 0.05 + 0.33 * i) * s.width
        sky = _over(sky, _pine(s, x, 0.62 * s.height, 0.26), s.colour((74, 116, 116)))
    sky = _over(
        sky,
        s.hills(0.6, 0.03, 1.0, s.number(6, 0, 1)),
        s.gradient([(0.56, (236, 243, 252)), (1, (250, 252, 255))]),
    )
    return _over(sky, s.dots(0.0102, 9), s.colour(_WHITE))


def _pine(s: _Sheet, x: Tensor, foot: float, height: float) -> Tensor:
    """Return the cover of a pine: three triangles one over the other."""
    cover = torch.zeros((), device=s.p.device)
    for top, bottom, half in ((1.0, 0.6, 0.15), (0.78, 0.34, 0.22), (0.54, 0.0, 0.29)):
        y0, y1 = foot - top * height, foot - bottom * height
        inside = half * height * (s.y - y0) / (y1 - y0) - (s.x - x).abs()
        cover = torch.maximum(cover, s.edge(torch.minimum(inside, y1 - s.y)))
    return cover


def _forest(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (168, 214, 178)), (0.66, (214, 234, 196))])
    for i in range(5):
        sky = _over(
            sky,
            _pine(s, (0.02 + 0.24 * i + s.number(3, -0.06, 0.06)) * s.width, 0.7 * s.height, 0.56),
            s.colour((92, 158, 112)),
        )
    for i in range(4):
        x = (0.1 + 0.27 * i + s.number(4 + i, -0.07, 0.07)) * s.width
        sky = _over(sky, _pine(s, x, 0.76 * s.height, 0.7), s.colour((34, 98, 66)))
    return _over(
        sky,
        s.hills(0.74, 0.015, 1.0, s.number(3, 0, 1)),
        s.gradient([(0.72, (88, 132, 62)), (1, (52, 92, 40))]),
    )


def _space(s: _Sheet) -> Tensor:
    sky = s.colour((14, 8, 32)).expand(-1, -1, s.y.numel(), s.x.numel())
    for i, colour in enumerate(((104, 34, 128), (34, 52, 132))):
        x, y = s.number(3 + i, 0, 1) * s.width, s.number(6 - i, 0, 1) * s.height
        glow = torch.exp(-((s.x - x) ** 2 + (s.y - y) ** 2) / 0.12)
        sky = _over(sky, 0.75 * glow, s.colour(colour))
    sky = _over(sky, s.dots(0.007, 10), s.colour((255, 252, 236)))
    x = s.number(5, 0.1, 0.9) * s.width
    foot = 0.9 * s.height
    radius = 0.16
    light = ((s.x - x) * -0.6 + (s.y - foot) * -0.8) / radius
    planet = torch.lerp(
        s.colour((120, 40, 60)), s.colour((246, 150, 96)), (0.5 + 0.6 * light).clamp(0, 1)
    )
    return _over(sky, s.disc(x, foot, radius), planet)


def _beach(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (92, 186, 248)), (0.42, (206, 238, 252))])
    sky = _over(
        sky, s.disc(s.number(3, 0.12, 0.88) * s.width, 0.15, 0.085), s.colour((255, 232, 110))
    )
    sky = _over(
        sky,
        s.edge(s.y - 0.42 * s.height),
        s.gradient([(0.42, (20, 130, 196)), (0.62, (72, 208, 212))]),
    )
    sky = _over(sky, s.hills(0.6, 0.02, 1.4, s.number(4, 0, 1)), s.colour((248, 252, 252)))
    return _over(
        sky,
        s.hills(0.63, 0.02, 1.4, s.number(4, 0, 1)),
        s.gradient([(0.6, (238, 204, 138)), (1, (250, 226, 170))]),
    )


def _peak(s: _Sheet, x: Tensor, top: float, foot: float, slope: float) -> tuple[Tensor, Tensor]:
    """Return the covers of a mountain and of its cap of snow."""
    inside = (s.y - top) / slope - (s.x - x).abs()
    jagged = top + 0.3 * (foot - top) + 0.02 * torch.cos((s.x - x) * 52)
    mountain = s.edge(inside)
    return mountain, mountain * s.edge(jagged - s.y)


def _mountains(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (124, 180, 236)), (0.6, (226, 238, 250))])
    peaks = (
        (3, 0.02, 0.3, 0.28, (128, 142, 178)),
        (4, 0.6, 0.95, 0.22, (112, 126, 164)),
        (5, 0.3, 0.62, 0.36, (92, 106, 146)),
    )
    for i, low, high, top, colour in peaks:
        mountain, cap = _peak(
            s, s.number(i, low, high) * s.width, top * s.height, 0.76 * s.height, 1.25
        )
        sky = _over(sky, mountain, s.colour(colour))
        sky = _over(sky, cap, s.colour((248, 250, 255)))
    return _over(
        sky,
        s.hills(0.74, 0.02, 1.0, s.number(6, 0, 1)),
        s.gradient([(0.7, (104, 164, 84)), (1, (66, 122, 58))]),
    )


def _city(s: _Sheet) -> Tensor:
    sky = s.gradient([(0, (148, 178, 220)), (0.8, (244, 222, 206))])
    street = HORIZON["city"] or 1
    cell = 1 / _TOKENS
    columns = torch.floor(s.x / cell)
    window = s.edge(0.25 * cell - (s.x - (columns + 0.5) * cell).abs())
    rows = (torch.floor(s.y / cell) + 0.5) * cell
    window = window * s.edge(0.3 * cell - (s.y - rows).abs())
    heights = (0.42, 0.22, 0.5, 0.3, 0.16, 0.46, 0.34, 0.52)
    colours = ((112, 118, 150), (88, 96, 132), (134, 128, 148), (100, 108, 140))
    shift = (s.number(3, 0, 1) * len(heights)).floor()
    block = (torch.floor(columns / 3) + shift) % len(heights)
    tower = torch.zeros_like(block).expand(-1, 3, -1, -1)
    tops = torch.zeros_like(block)
    for i, top in enumerate(heights):
        here = (block == i).float()
        tops = tops + here * top
        tower = tower + here * s.colour(colours[i % len(colours)])
    tops = (tops * s.height / cell).round() * cell
    sky = _over(
        sky,
        s.edge(s.y - tops),
        torch.lerp(tower, s.colour((252, 226, 140)), 0.8 * window * (s.y > tops + cell)),
    )
    return _over(
        sky,
        s.edge(s.y - street * s.height),
        s.gradient([(street, (118, 118, 126)), (1, (84, 84, 94))]),
    )


def _underwater(s: _Sheet) -> Tensor:
    water = s.gradient([(0, (92, 214, 222)), (0.5, (22, 132, 184)), (1, (6, 58, 118))])
    slant = s.x - 0.35 * s.y + s.number(3, 0, 1)
    rays = (torch.sin(11 * slant) * torch.sin(4.3 * slant + 1)).clamp(min=0) * (1 - s.y / s.height)
    water = _over(water, 0.28 * rays, s.colour(_WHITE))
    for i in range(4):
        x = (0.08 + 0.28 * i + s.number(4 + i, -0.06, 0.06)) * s.width
        sway = 0.02 * torch.sin(26 * s.y + 2 * i)
        top = s.height * (0.62 + 0.07 * (i % 3))
        weed = (
            torch.minimum(0.016 + 0.05 * (s.y - top).clamp(max=0.1), s.y - top)
            - (s.x - x - sway).abs()
        )
        water = _over(water, s.edge(weed), s.colour((20, 128, 92)))
    return _over(
        water,
        s.hills(0.9, 0.02, 1.2, s.number(3, 0, 1)),
        s.gradient([(0.88, (196, 186, 138)), (1, (150, 146, 116))]),
    )


def _room(s: _Sheet) -> Tensor:
    floor = HORIZON["room"] or 1
    wall = s.gradient([(0, (246, 226, 196)), (floor, (238, 212, 178))])
    x = s.number(3, 0.22, 0.78) * s.width
    y = 0.26 * s.height
    half = 0.15

    def pane(width: float) -> Tensor:
        return s.edge(width - torch.maximum((s.x - x).abs(), (s.y - y).abs()))

    wall = _over(wall, pane(half + 0.03), s.colour((252, 250, 246)))
    wall = _over(wall, pane(half), s.gradient([(0.1, (122, 196, 248)), (0.45, (214, 240, 252))]))
    bars = s.edge(0.012 - torch.minimum((s.x - x).abs(), (s.y - y).abs())) * pane(half)
    wall = _over(wall, bars, s.colour((252, 250, 246)))
    wall = _over(wall, s.edge(s.y - (floor - 0.03) * s.height), s.colour((252, 246, 236)))
    boards = s.gradient([(floor, (176, 118, 72)), (1, (150, 94, 54))])
    seams = ((s.y / s.height - floor) * 26).remainder(2.0)
    boards = boards - 14 * (seams < 0.22)
    return _over(wall, s.edge(s.y - floor * s.height), boards)


_SCENES: dict[str, Callable[[_Sheet], Tensor]] = {
    "day sky": _day_sky,
    "sunset": _sunset,
    "starry night": _starry_night,
    "sea": _sea,
    "meadow": _meadow,
    "desert": _desert,
    "snow": _snow,
    "forest": _forest,
    "space": _space,
    "beach": _beach,
    "mountains": _mountains,
    "city": _city,
    "underwater": _underwater,
    "room": _room,
}


class _Bank:
    """Every scene in `VARIANTS` variants of one size.

    On a CPU each is painted when it is first asked for, elsewhere all are painted at once.
    """

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self._size = (height, width)
        self._images = torch.empty(
            len(SCENES) * VARIANTS, 3, height, width, dtype=torch.uint8, device=device
        )
        self._missing = set(range(len(self._images)))
        self._lazy = device.type == "cpu"
        if not self._lazy:
            self._paint(sorted(self._missing))

    def _paint(self, numbers: list[int]) -> None:
        height, width = self._size
        device, unit = self._images.device, min(height, width)
        x, y = ((torch.arange(extent, device=device) + 0.5) / unit for extent in (width, height))
        table = torch.rand(VARIANTS, PARAMETERS, generator=torch.Generator().manual_seed(0)).to(
            device
        )
        for scene, name in enumerate(SCENES):
            rows = torch.tensor(
                [number for number in numbers if number // VARIANTS == scene],
                dtype=torch.long,
                device=device,
            )
            if len(rows):
                sheet = _Sheet(
                    table[rows % VARIANTS],
                    x[None, None, None],
                    y[None, None, :, None],
                    width / unit,
                    height / unit,
                    unit,
                )
                self._images[rows] = (_SCENES[name](sheet) + 0.5).clamp(0, 255).to(torch.uint8)
        self._missing -= set(numbers)

    def take(self, numbers: Tensor) -> Tensor:
        """Return images `[n,3,height,width]` uint8; numbers: scene × VARIANTS + variant."""
        if self._lazy and self._missing:
            self._paint(sorted(self._missing.intersection(numbers.tolist())))
        return self._images[numbers]


_bank = lru_cache(maxsize=8)(_Bank)


@lru_cache(maxsize=8)
def _palette(device: torch.device) -> Tensor:
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)


def paint(background: Tensor, params: Tensor, height: int, width: int) -> Tensor:
    """Return images of backgrounds `[N,3,height,width]` of 0…255, float32.

    background: indices into `BACKGROUNDS` `[N]`; params: numbers of 0…1 `[N,8]`: the first three
    vary a plain colour, the fourth chooses one of the `VARIANTS` of a scene. After the first call
    for a size nothing waits for the device.
    """
    device = params.device
    scene = background.long() - len(NAMES)
    variant = (params[:, 3] * VARIANTS).long().clamp(0, VARIANTS - 1)
    plain = _palette(device)[background.long().clamp(max=len(NAMES) - 1)] + _WOBBLE * (
        2 * params[:, :3].float() - 1
    )
    images = plain.clamp(0, 255)[:, :, None, None].expand(-1, -1, height, width).contiguous()
    numbers = scene * VARIANTS + variant
    if device.type == "cpu":
        rows = (scene >= 0).nonzero()[:, 0]
        if len(rows):
            images[rows] = _bank(height, width, device).take(numbers[rows]).float()
        return images
    painted = _bank(height, width, device).take(numbers.clamp(min=0))
    return torch.where((scene >= 0)[:, None, None, None], painted.float(), images)
