"""Pictures from layouts: backgrounds with sprites pasted over them, antialiased, in batches on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.backgrounds import PARAMETERS, paint
from model.training.kinds import SHAPES

MOST_SPRITES = 4
_CHUNK = 256  # pictures that are drawn at once


@dataclass(frozen=True)
class Layouts:
    """Where everything is in N pictures of up to M sprites each.

    background `[N]` int16 and params `[N,8]` float32: see `backgrounds.paint`. sprite `[N,M]` int16: index into `NAMES_OF_KINDS`, -1 for none.
    centre `[N,M,2]` float32: x and y of the sprite's middle in pixels. length `[N,M]` float32: pixels of its longer side. mirror `[N,M]` bool.
    angle `[N,M]` float32: degrees clockwise. tint `[N,M,3]` uint8: a shape's colour; objects have their own.
    """

    background: Tensor
    params: Tensor
    sprite: Tensor
    centre: Tensor
    length: Tensor
    mirror: Tensor
    angle: Tensor
    tint: Tensor

    @classmethod
    def blank(cls, count: int, sprites: int = MOST_SPRITES) -> Layouts:
        """Layouts of `count` white pictures without sprites, to be filled in place."""
        return cls(
            background=torch.full((count,), 10, dtype=torch.int16),
            params=torch.full((count, PARAMETERS), 0.5),
            sprite=torch.full((count, sprites), -1, dtype=torch.int16),
            centre=torch.zeros(count, sprites, 2),
            length=torch.zeros(count, sprites),
            mirror=torch.zeros(count, sprites, dtype=torch.bool),
            angle=torch.zeros(count, sprites),
            tint=torch.full((count, sprites, 3), 255, dtype=torch.uint8),
        )

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, rows: Tensor | slice) -> Layouts:
        """The layouts of some rows, in their order."""
        return Layouts(**{name: tensor[rows] for name, tensor in self.state().items()})

    def to(self, device: torch.device | str) -> Layouts:
        """The same on a device."""
        return Layouts(**{name: tensor.to(device) for name, tensor in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, for saving; `Layouts(**state)` is the way back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @staticmethod
    def cat(parts: Sequence[Layouts]) -> Layouts:
        """All rows of some layouts of the same M, one after the other."""
        states = [part.state() for part in parts]
        return Layouts(**{name: torch.cat([state[name] for state in states]) for name in states[0]})


@dataclass(frozen=True)
class _Placed:
    """n sprites to draw: the fields of `Layouts`, one sprite a row."""

    sprite: Tensor
    centre: Tensor
    length: Tensor
    mirror: Tensor
    angle: Tensor
    tint: Tensor


def _sample(placed: _Placed, atlas: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The sprites as they look in a box (left, top, width, height) of the picture: `[n,4,height,width]`, 0…255, premultiplied by alpha.

    Each pixel is the mean of four bilinear samples from a sprite that was halved until it is less than twice as long as asked.
    """
    left, top, width, height = box
    device = atlas.device
    masters = atlas[placed.sprite.long()].float()
    shape = (placed.sprite < len(SHAPES))[:, None, None, None]
    colour = torch.where(shape, placed.tint.float()[:, :, None, None] / 255, 1.0)
    turn = torch.deg2rad(placed.angle)
    unit = 2 / placed.length  # grid_sample's picture reaches from -1 to 1
    cosine, sine = torch.cos(turn) * unit, torch.sin(turn) * unit
    flip = torch.where(placed.mirror, -1.0, 1.0)
    x = (torch.arange(2 * width, device=device) + 0.5) / 2 + left - placed.centre[:, :1]
    y = (torch.arange(2 * height, device=device) + 0.5) / 2 + top - placed.centre[:, 1:]
    x, y = x[:, None, :], y[:, :, None]
    cosine, sine, flip = cosine[:, None, None], sine[:, None, None], flip[:, None, None]
    grid = torch.stack([(x * cosine + y * sine) * flip, y * cosine - x * sine], dim=-1)
    if len(placed.length) and float(placed.length.max()) * 2 <= masters.shape[-1]:
        masters = F.avg_pool2d(masters, 2)
    sampled = F.avg_pool2d(F.grid_sample(masters, grid, mode="bilinear", padding_mode="zeros", align_corners=False), 2)
    return torch.cat([sampled[:, :3] * colour, sampled[:, 3:]], dim=1)


def _box(length: float, x: float, y: float, angle: float, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of the part of the picture that a sprite can touch."""
    reach = length / 2 * (1.0 if angle == 0 else 1.42) + 2
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    return left, top, min(width, int(x + reach) + 1) - left, min(height, int(y + reach) + 1) - top


def _parts(layouts: Layouts, slot: int, width: int, height: int) -> Iterator[tuple[Tensor, _Placed, tuple[int, int, int, int]]]:
    """Rows that have a sprite in a slot, in groups that share a box: each alone on a CPU, all together on a GPU."""
    rows = (layouts.sprite[:, slot] >= 0).nonzero()[:, 0]
    fields = [getattr(layouts, field.name)[rows, slot] for field in dataclasses.fields(_Placed)]
    if layouts.sprite.device.type != "cpu":
        halved = fields[2] * 2 <= 256
        for chosen in (halved, ~halved):
            if bool(chosen.any()):
                yield rows[chosen], _Placed(*(field[chosen] for field in fields)), (0, 0, width, height)
        return
    placed = zip(fields[2].tolist(), fields[1].tolist(), fields[4].tolist(), strict=True)
    for i, (length, (x, y), angle) in enumerate(placed):
        yield rows[i : i + 1], _Placed(*(field[i : i + 1] for field in fields)), _box(length, x, y, angle, width, height)


def _draw(layouts: Layouts, atlas: Tensor, width: int, height: int) -> Tensor:
    pictures = paint(layouts.background.long(), layouts.params, height, width)
    for slot in range(layouts.sprite.shape[1]):
        for rows, placed, box in _parts(layouts, slot, width, height):
            left, top, w, h = box
            if w <= 0 or h <= 0:
                continue
            patch = _sample(placed, atlas, box)
            if len(rows) == 1:
                view = pictures[int(rows), :, top : top + h, left : left + w]
                view.mul_(1 - patch[0, 3:] / 255).add_(patch[0, :3])
            else:
                pictures[rows] = pictures[rows] * (1 - patch[:, 3:] / 255) + patch[:, :3]
    return (pictures + 0.5).clamp_(0, 255).to(torch.uint8)


@torch.no_grad()
def render(layouts: Layouts, atlas: Tensor, width: int = 256, height: int = 256) -> Tensor:
    """The layouts' pictures `[N,3,height,width]` uint8, on the device of both arguments; later sprites lie over earlier ones.

    atlas: `art.atlas()` or any `[S,4,side,side]` uint8 that holds every sprite the layouts name, premultiplied by alpha.
    """
    parts = [_draw(layouts[i : i + _CHUNK], atlas, width, height) for i in range(0, len(layouts), _CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, 3, height, width, dtype=torch.uint8, device=atlas.device)
