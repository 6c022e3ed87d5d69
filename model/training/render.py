"""Draw images from layouts: backgrounds with sprites pasted over them, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.backgrounds import PARAMETERS, paint
from model.training.kinds import SHAPES

MOST_SPRITES = 4
_CHUNK = 256  # images that are drawn at once
_TAPS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))  # where a pixel is sampled


@dataclass(frozen=True)
class Layouts:
    """Where everything is in N images of up to M sprites each.

    background `[N]` int16 and params `[N,8]` float32: see `backgrounds.paint`. sprite `[N,M]`
    int16: index into `NAMES_OF_KINDS`, -1 for none. centre `[N,M,2]` float32: x and y of the
    sprite's middle in pixels. length `[N,M]` float32: pixels of its longer side. mirror `[N,M]`
    bool: swap left and right. angle `[N,M]` float32: degrees clockwise. tint `[N,M,3]` uint8: a
    shape's colour; objects have their own.
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
        """Return layouts of `count` white images without sprites, to be filled in place."""
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
        """Return the layouts of some rows, in their order."""
        return Layouts(**{name: tensor[rows] for name, tensor in self.state().items()})

    def to(self, device: torch.device | str) -> Layouts:
        """Return the same on a device."""
        return Layouts(**{name: tensor.to(device) for name, tensor in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by name, for saving; `Layouts(**state)` is the way back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @staticmethod
    def cat(parts: Sequence[Layouts]) -> Layouts:
        """Return the rows of some layouts of the same M, one after the other."""
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
    """Return the sprites as they look in a box (left, top, width, height) of the image.

    The result is `[n,4,height,width]` of 0…255, premultiplied by alpha. Each pixel is the mean of
    four bilinear samples, which is smooth down to a quarter of the atlas' side.
    """
    left, top, width, height = box
    masters = atlas[placed.sprite.long().clamp(min=0)].float()
    turn = torch.deg2rad(placed.angle)
    unit = 2 / placed.length.clamp(min=1)  # grid_sample's sprite reaches from -1 to 1
    cosine, sine = ((f(turn) * unit)[:, None, None] for f in (torch.cos, torch.sin))
    flip = torch.where(placed.mirror, -1.0, 1.0)[:, None, None]
    x = torch.arange(width, device=atlas.device) + left - placed.centre[:, None, :1]
    y = torch.arange(height, device=atlas.device)[:, None] + top - placed.centre[:, 1:, None]
    total: Tensor | None = None
    for dx, dy in _TAPS:
        u, v = x + dx, y + dy
        grid = torch.stack([(u * cosine + v * sine) * flip, v * cosine - u * sine], dim=-1)
        sampled = F.grid_sample(
            masters, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        total = sampled if total is None else total.add_(sampled)
    assert total is not None
    shape = (placed.sprite < len(SHAPES))[:, None]
    share = torch.where(shape, placed.tint.float() / 255, 1.0) / len(_TAPS)
    cover = (
        torch.cat([share, torch.full_like(share[:, :1], 1 / len(_TAPS))], dim=1)
        * (placed.sprite >= 0)[:, None]
    )
    return total * cover[:, :, None, None]


def _box(
    length: float, x: float, y: float, angle: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the part of the image that a sprite can touch."""
    reach = length / 2 * (1.0 if angle == 0 else 1.42) + 2
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    return left, top, min(width, int(x + reach) + 1) - left, min(height, int(y + reach) + 1) - top


def _draw_all(images: Tensor, layouts: Layouts, slot: int, atlas: Tensor) -> None:
    """Draw the sprites of a slot over all images at once, without waiting for the device."""
    placed = _Placed(
        *(getattr(layouts, field.name)[:, slot] for field in dataclasses.fields(_Placed))
    )
    patch = _sample(placed, atlas, (0, 0, images.shape[3], images.shape[2]))
    images.mul_(1 - patch[:, 3:] / 255).add_(patch[:, : images.shape[1]])


def _draw_each(images: Tensor, layouts: Layouts, slot: int, atlas: Tensor) -> None:
    """Draw the sprites of a slot one by one, each in its own box."""
    height, width = images.shape[2:]
    for row in (layouts.sprite[:, slot] >= 0).nonzero()[:, 0].tolist():
        placed = _Placed(
            *(
                getattr(layouts, field.name)[row : row + 1, slot]
                for field in dataclasses.fields(_Placed)
            )
        )
        x, y = placed.centre[0].tolist()
        box = _box(float(placed.length), x, y, float(placed.angle), width, height)
        left, top, w, h = box
        if w > 0 and h > 0:
            patch = _sample(placed, atlas, box)[0]
            covered = images[row, :, top : top + h, left : left + w]
            covered.mul_(1 - patch[3:] / 255).add_(patch[: len(covered)])


def _draw(
    layouts: Layouts, atlas: Tensor, width: int, height: int, sprites_only: bool = False
) -> Tensor:
    if sprites_only:
        images = torch.zeros(len(layouts), 4, height, width, device=atlas.device)
    else:
        images = paint(layouts.background, layouts.params, height, width)
    draw = _draw_each if atlas.device.type == "cpu" else _draw_all
    for slot in range(layouts.sprite.shape[1]):
        draw(images, layouts, slot, atlas)
    return images.add_(0.5).clamp_(0, 255).to(torch.uint8)


@torch.no_grad()
def render(
    layouts: Layouts,
    atlas: Tensor,
    width: int = 256,
    height: int = 256,
    *,
    sprites_only: bool = False,
) -> Tensor:
    """Return the layouts' images `[N,3,height,width]` uint8, on the device of both arguments.

    Later sprites lie over earlier ones. atlas: `art.atlas()` or any `[S,4,side,side]` uint8 of
    sprites premultiplied by alpha that holds every sprite the layouts name. sprites_only: return
    `[N,4,height,width]`, the sprites on nothing, premultiplied by alpha.
    """
    parts = [
        _draw(layouts[i : i + _CHUNK], atlas, width, height, sprites_only)
        for i in range(0, len(layouts), _CHUNK)
    ]
    channels = 4 if sprites_only else 3
    return (
        torch.cat(parts)
        if parts
        else torch.empty(0, channels, height, width, dtype=torch.uint8, device=atlas.device)
    )
