"""Find the background of an image without a network: the closest of all backgrounds.

A plain colour is read from the border. A painted scene is compared with every variant of all
scenes; a model mixes variants, so each pixel takes the most similar one of the few closest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.backgrounds import PARAMETERS, VARIANTS, paint
from model.training.palette import COLOURS
from model.training.scenery import BACKGROUNDS

_COARSE, _CLOSE = 16, 64  # pixels of the shorter side in which all and the last few are compared
_BORDER, _BORDER_WEIGHT = 1 / 12, 4.0  # share along the edge that counts more: seldom covered
_CAP = 25.0  # ΔE beyond which a pixel is taken for a thing's
_LAST = 24  # paintings that are compared closely
_MIXED = 6  # of one scene that an image may be a mixture of
_PLAIN_FIRST = 1.5  # ΔE that a painted scene must be closer than a plain colour
_PLAIN = len(COLOURS)

_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.072175),
    (0.0193339, 0.119192, 0.9503041),
)


def lab(rgb: Tensor) -> Tensor:
    """Turn sRGB of 0 … 1 [N, 3, …] into CIELAB (D65) [N, 3, …]."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = rgb.new_tensor(_XYZ)
    xyz = torch.einsum("dc,nc...->nd...", matrix / matrix.sum(1, keepdim=True), linear)
    f = torch.where(
        xyz > (6 / 29) ** 3, xyz.clamp_min(1e-6) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29
    )
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


class Bank:
    """All variants of all scenes in one size, K in all.

    coarse: CIELAB [K, 3, h, w]. images: uint8 [K, 3, H, W].
    """

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        numbers = torch.arange(_PLAIN, len(BACKGROUNDS), device=device)
        self.scenes = numbers.repeat_interleave(VARIANTS)
        params = torch.zeros(VARIANTS, PARAMETERS, device=device)
        params[:, 3] = (torch.arange(VARIANTS, device=device) + 0.5) / VARIANTS
        painted = [paint(number.expand(VARIANTS), params, *size) for number in numbers]
        self.images = torch.cat([some.round().to(torch.uint8) for some in painted])
        coarse = _scaled(self.images.float(), _scaled_size(size, _COARSE))
        self.coarse = lab(coarse / 255)


class Backdrops:
    """Find the backgrounds of images."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.palette = lab(torch.tensor(list(COLOURS.values()))[..., None].to(device) / 255)[..., 0]
        self._banks: dict[tuple[int, int], Bank] = {}

    def find(self, planes: Tensor) -> tuple[list[int], Tensor]:
        """Return the numbers in BACKGROUNDS, and the backgrounds [N, 3, H, W] of 0 … 1.

        planes: the images, [N, 3, H, W] of 0 … 1.
        """
        size = (planes.shape[-2], planes.shape[-1])
        if size not in self._banks:
            self._banks[size] = Bank(size, self.device)
        bank = self._banks[size]
        coarse = lab(_scaled(planes, _scaled_size(size, _COARSE)))
        colour = _border_colour(planes)
        plain = _cost(coarse, lab(colour[..., None, None]))
        costs = torch.cat([_cost(one[None], bank.coarse)[None] for one in coarse])  # [N, K]
        is_plain = plain <= costs.amin(1) + _PLAIN_FIRST
        named = (lab(colour[..., None])[..., 0][:, None] - self.palette).square().sum(-1).argmin(-1)
        behind = colour[..., None, None].expand_as(planes).clone()
        numbers = named.tolist()
        for i in (~is_plain).nonzero()[:, 0].tolist():
            last = costs[i].topk(_LAST, largest=False).indices
            numbers[i], behind[i] = _mixture(planes[i : i + 1], bank, last)
        return numbers, behind


def _mixture(plane: Tensor, bank: Bank, last: Tensor) -> tuple[int, Tensor]:
    """Return the scene's number and the background [3, H, W] of an image [1, 3, H, W].

    last: numbers in the bank of the paintings to choose from.
    """
    size = _scaled_size((plane.shape[-2], plane.shape[-1]), _CLOSE)
    painted = bank.images[last].float() / 255
    cost = _cost(lab(_scaled(plane, size)), lab(_scaled(painted, size)))
    scenes = bank.scenes[last]
    number = int(scenes[cost.argmin()])
    order = torch.where(scenes == number, cost, torch.inf).argsort()[:_MIXED]
    order = order[scenes[order] == number]
    chosen = painted[order]
    chosen = (chosen + _bias(plane, chosen)).clamp(0, 1)
    apart = (lab(plane) - lab(chosen)).square().sum(1)
    closest = F.avg_pool2d(apart[:, None], 3, 1, 1)[:, 0].argmin(0)  # [H, W]
    return number, chosen.gather(0, closest.expand(1, 3, -1, -1))[0]


def _scaled_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _scaled(planes: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(planes.shape[-2:]) == size:
        return planes
    return F.interpolate(planes, size, mode="bilinear", antialias=True)


def _weight(height: int, width: int, device: torch.device) -> Tensor:
    """Return [H, W], the mean 1."""
    edge = max(1, round(min(height, width) * _BORDER))
    weight = torch.full((height, width), _BORDER_WEIGHT, device=device)
    weight[edge:-edge, edge:-edge] = 1.0
    return weight / weight.mean()


def _cost(small: Tensor, other: Tensor) -> Tensor:
    """Return the mean ΔE [N] of images [N, 3, H, W], no pixel's larger than the cap."""
    apart = (small - other).square().sum(1).sqrt().clamp_max(_CAP)
    return (apart * _weight(apart.shape[1], apart.shape[2], apart.device)).mean((1, 2))


def _border_colour(planes: Tensor) -> Tensor:
    """Return the median colour [N, 3] along the edge of images [N, 3, H, W]."""
    edge = max(1, min(planes.shape[-2:]) // 32)
    sides = [planes[..., :edge, :], planes[..., -edge:, :]]
    sides += [planes[..., :edge].transpose(2, 3), planes[..., -edge:].transpose(2, 3)]
    return torch.cat([side.flatten(2) for side in sides], dim=2).median(2).values


def _bias(planes: Tensor, behind: Tensor) -> Tensor:
    """Return how much brighter images [N, 3, H, W] are than backgrounds, [N, 3, 1, 1]."""
    apart = (planes - behind).flatten(2)
    near = apart.abs().amax(1, keepdim=True) < 0.12
    share = near.float().sum(2).clamp_min(1)
    return ((apart * near).sum(2) / share)[..., None, None]
